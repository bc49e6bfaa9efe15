# Kernel sources as C++; what speaks to the CUDA run time is left out.
list(FILTER kernel_sources EXCLUDE REGEX "/register\\.cu$")
set(emulator_sources fiber.cpp block.cpp launch.cpp)
set_source_files_properties(${kernel_sources} PROPERTIES LANGUAGE CXX)
list(TRANSFORM emulator_sources PREPEND ${PROJECT_SOURCE_DIR}/tests/emulator/)
add_library(subquad_cuda_emulated OBJECT ${kernel_sources} ${emulator_sources})
set_target_properties(subquad_cuda_emulated PROPERTIES CXX_STANDARD 17 CXX_EXTENSIONS OFF POSITION_INDEPENDENT_CODE ON
  CXX_VISIBILITY_PRESET hidden)
target_include_directories(subquad_cuda_emulated PRIVATE src ${PROJECT_SOURCE_DIR}/cpp/include
  ${PROJECT_SOURCE_DIR}/cpp/src ${PROJECT_SOURCE_DIR}/tests)
# Optimised in every build type: the emulator runs a thousand threads for one of the hardware's.
target_compile_options(subquad_cuda_emulated PRIVATE -O2 -ffp-contract=off -Wno-unknown-pragmas)
target_link_libraries(subquad_cuda_emulated PRIVATE subquad_options)
target_sources(subquad_core PRIVATE $<TARGET_OBJECTS:subquad_cuda_emulated>)
