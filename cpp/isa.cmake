# The rows of CPU kernels, slowest first: name and compiler flags. The run-time tests are in src/cpu/detect.cpp.
include(CheckCXXCompilerFlag)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(SUBQUAD_ROWS x86_64 x86_64_v3 x86_64_v4)
  set(SUBQUAD_FLAGS_x86_64 "")
  set(SUBQUAD_FLAGS_x86_64_v3 -march=x86-64-v3)
  set(SUBQUAD_FLAGS_x86_64_v4 -march=x86-64-v4 -mprefer-vector-width=512)
  # An overlay: the table of v4 in which the operators of cpu/amx are replaced.
  set(SUBQUAD_FLAGS_x86_64_amx ${SUBQUAD_FLAGS_x86_64_v4} -mavx512bf16 -mamx-tile -mamx-bf16)
  check_cxx_compiler_flag("-mavx512bf16 -mamx-tile -mamx-bf16" SUBQUAD_COMPILER_KNOWS_AMX)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
  set(SUBQUAD_ROWS neon)
  set(SUBQUAD_FLAGS_neon -march=armv8-a)
else()
  message(FATAL_ERROR "subquad has no CPU kernels for ${CMAKE_SYSTEM_PROCESSOR}; it needs x86-64 or AArch64")
endif()
