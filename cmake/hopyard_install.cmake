# Installation: library, headers and a package that find_package(hopyard) reads (component `dev`),
# and the command (component `cli`). The Python extension has a component of its own.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(hopyard_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/hopyard)
install(
  TARGETS hopyard
  EXPORT hopyard_targets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT dev
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT dev
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT dev)
install(
  DIRECTORY ${PROJECT_SOURCE_DIR}/include/hopyard
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  COMPONENT dev
  FILES_MATCHING
  PATTERN "*.h")
install(
  EXPORT hopyard_targets
  NAMESPACE hopyard::
  FILE hopyardTargets.cmake
  DESTINATION ${hopyard_package_dir}
  COMPONENT dev)
configure_package_config_file(
  ${PROJECT_SOURCE_DIR}/cmake/hopyardConfig.cmake.in ${PROJECT_BINARY_DIR}/hopyardConfig.cmake
  INSTALL_DESTINATION ${hopyard_package_dir})
write_basic_package_version_file(
  ${PROJECT_BINARY_DIR}/hopyardConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(
  FILES ${PROJECT_BINARY_DIR}/hopyardConfig.cmake ${PROJECT_BINARY_DIR}/hopyardConfigVersion.cmake
  DESTINATION ${hopyard_package_dir}
  COMPONENT dev)
if(TARGET hopyard_cli)
  install(TARGETS hopyard_cli RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT cli)
endif()
