# The hopyard command.
find_package(CLI11 REQUIRED)
file(GLOB hopyard_cli_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/cli/*.cc)
list(FILTER hopyard_cli_sources EXCLUDE REGEX "_test\\.cc$")
add_executable(hopyard_cli ${hopyard_cli_sources})
set_target_properties(hopyard_cli PROPERTIES OUTPUT_NAME hopyard)
target_include_directories(hopyard_cli PRIVATE ${CMAKE_SOURCE_DIR}/src ${CMAKE_SOURCE_DIR})
target_link_libraries(
  hopyard_cli PRIVATE hopyard hopyard_options CLI11::CLI11 fmt::fmt-header-only
                      nlohmann_json::nlohmann_json OpenMP::OpenMP_CXX)

# Benchmark lines name the commit that they were built from; git's log of HEAD changes with it.
find_package(Git QUIET)
set(hopyard_git unknown)
if(Git_FOUND)
  execute_process(
    COMMAND ${GIT_EXECUTABLE} rev-parse --short=12 HEAD
    WORKING_DIRECTORY ${CMAKE_SOURCE_DIR}
    OUTPUT_VARIABLE hopyard_git_out
    RESULT_VARIABLE hopyard_git_failed
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(NOT hopyard_git_failed)
    set(hopyard_git ${hopyard_git_out})
  endif()
endif()
if(EXISTS ${CMAKE_SOURCE_DIR}/.git/logs/HEAD)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/.git/logs/HEAD)
endif()
set_source_files_properties(${CMAKE_SOURCE_DIR}/src/cli/bench.cc
                            PROPERTIES COMPILE_DEFINITIONS "HOPYARD_GIT=\"${hopyard_git}\"")
