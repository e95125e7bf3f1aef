# One libFuzzer executable per *_fuzz.cc. The library is instrumented as well: without coverage of
# the code under test the fuzzer would be blind.
if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
  message(FATAL_ERROR "HOPYARD_FUZZ=ON with compiler ${CMAKE_CXX_COMPILER_ID}; libFuzzer needs "
                      "clang: configure with `cmake --preset fuzz`")
endif()
# Warnings are judged by the compiler of the release build, not by a second one.
target_compile_options(
  hopyard_options INTERFACE -Wno-error -fsanitize=fuzzer-no-link,address,undefined
                            -fno-sanitize-recover=all -fno-omit-frame-pointer)
file(GLOB_RECURSE hopyard_fuzzers CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/*_fuzz.cc)
foreach(source IN LISTS hopyard_fuzzers)
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/src)
  target_link_libraries(${name} PRIVATE hopyard hopyard_options fmt::fmt-header-only
                                        nlohmann_json::nlohmann_json)
  target_link_options(${name} PRIVATE -fsanitize=fuzzer,address,undefined)
endforeach()
