# The hopyard command.
find_package(CLI11 REQUIRED)
file(GLOB hopyard_cli_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/cli/*.cc)
list(FILTER hopyard_cli_sources EXCLUDE REGEX "_test\\.cc$")
add_executable(hopyard_cli ${hopyard_cli_sources})
set_target_properties(hopyard_cli PROPERTIES OUTPUT_NAME hopyard)
target_include_directories(hopyard_cli PRIVATE ${CMAKE_SOURCE_DIR}/src)
target_link_libraries(
  hopyard_cli PRIVATE hopyard hopyard_options CLI11::CLI11 fmt::fmt-header-only
                      nlohmann_json::nlohmann_json OpenMP::OpenMP_CXX)
