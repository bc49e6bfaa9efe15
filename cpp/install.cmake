# What `cmake --install` and the wheel give to C++ programs: headers, the library, find_package(subquad CONFIG).
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(CONFIG_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/subquad)
if(SKBUILD)
  # Inside a wheel everything lives in the package; `python -m subquad --cmake-dir` tells where.
  set(CMAKE_INSTALL_INCLUDEDIR subquad/include)
  set(CMAKE_INSTALL_LIBDIR subquad/lib)
  set(CONFIG_DIR subquad/cmake)
endif()
# For the CUDA library, which cuda/ adds.
set(SUBQUAD_LIB_DIR ${CMAKE_INSTALL_LIBDIR} CACHE INTERNAL "where libraries are installed")
set(SUBQUAD_CONFIG_DIR ${CONFIG_DIR} CACHE INTERNAL "where the package configuration is installed")
set_target_properties(subquad_core PROPERTIES EXPORT_NAME subquad OUTPUT_NAME subquad)
add_library(subquad::subquad ALIAS subquad_core)
install(TARGETS subquad_core EXPORT subquad ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY include/subquad DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT subquad NAMESPACE subquad:: DESTINATION ${CONFIG_DIR} FILE subquad-targets.cmake)
configure_package_config_file(subquad-config.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/subquad-config.cmake
  INSTALL_DESTINATION ${CONFIG_DIR})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/subquad-config-version.cmake COMPATIBILITY SameMajorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/subquad-config.cmake ${CMAKE_CURRENT_BINARY_DIR}/subquad-config-version.cmake
  DESTINATION ${CONFIG_DIR})
