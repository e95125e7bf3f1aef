# GPU benchmarks: one executable per bench/*.cc, label none; run by hand on a Hopper GPU.
if(NOT HOPYARD_CUDA)
  message(FATAL_ERROR "HOPYARD_BENCH=ON needs HOPYARD_CUDA=ON: configure with `cmake --preset "
                      "cuda-full`")
endif()
file(GLOB hopyard_benches CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/bench/*.cc)
foreach(source IN LISTS hopyard_benches)
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source})
  target_include_directories(${name} PRIVATE ${CMAKE_SOURCE_DIR}/src ${CMAKE_SOURCE_DIR})
  target_link_libraries(${name} PRIVATE hopyard hopyard_options CUDA::cudart_static
                                        fmt::fmt-header-only nlohmann_json::nlohmann_json)
endforeach()
