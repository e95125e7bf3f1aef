# One executable per *_test.cc, ctest label "cpu"; *_sm90_test.cc with HOPYARD_CUDA only, label "gpu".
# tests/*.cc without the suffix are shared helpers. HOPYARD_TESTS=GPU builds only the latter.
find_package(GTest REQUIRED)
file(GLOB hopyard_test_support CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/*.cc)
list(FILTER hopyard_test_support EXCLUDE REGEX "_test\\.cc$")
add_library(hopyard_test_support STATIC ${hopyard_test_support})
target_include_directories(hopyard_test_support PUBLIC ${CMAKE_SOURCE_DIR}/src ${CMAKE_SOURCE_DIR})
target_link_libraries(
  hopyard_test_support PUBLIC hopyard hopyard_options GTest::gmock GTest::gtest_main
                              fmt::fmt-header-only nlohmann_json::nlohmann_json
                              OpenMP::OpenMP_CXX)

file(GLOB_RECURSE hopyard_tests CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/*_test.cc
     ${CMAKE_SOURCE_DIR}/tests/*_test.cc)
if(NOT HOPYARD_CUDA)
  list(FILTER hopyard_tests EXCLUDE REGEX "_sm90_test\\.cc$")
elseif(HOPYARD_TESTS STREQUAL "GPU")
  list(FILTER hopyard_tests INCLUDE REGEX "_sm90_test\\.cc$")
endif()
foreach(source IN LISTS hopyard_tests)
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source})
  target_link_libraries(${name} PRIVATE hopyard_test_support)
  add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  if(source MATCHES "_sm90_test\\.cc$")
    target_link_libraries(${name} PRIVATE CUDA::cudart_static)
    # gtest's word for a skipped test, so that ctest says SKIPPED and not passed.
    set_tests_properties(${name} PROPERTIES LABELS gpu TIMEOUT 1200 SKIP_REGULAR_EXPRESSION
                                                                    "\\[  SKIPPED \\]")
  else()
    set_tests_properties(${name} PROPERTIES LABELS cpu TIMEOUT 1200)
  endif()
endforeach()
