# The Hopper backend: every *_sm90.cu below src/, compiled ahead of time for sm_90a and put into the
# library. Host code never includes a CUDA header, so nothing else changes with it.
set(CMAKE_CUDA_ARCHITECTURES 90a-real)
enable_language(CUDA)
# Required, the standard would be an error: see the flag below.
set(CMAKE_CUDA_STANDARD_REQUIRED OFF)
find_package(CUDAToolkit REQUIRED)
file(GLOB_RECURSE hopyard_cuda_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/*_sm90.cu)
add_library(hopyard_sm90 OBJECT ${hopyard_cuda_sources})
target_include_directories(hopyard_sm90 PRIVATE ${CMAKE_SOURCE_DIR}/include ${CMAKE_SOURCE_DIR}/src)
target_compile_options(
  hopyard_sm90
  PRIVATE # CMake 3.25 knows no C++20 for nvcc 13 and would drop the standard silently.
          -std=c++20
          --expt-relaxed-constexpr
          # zstd: an eighth of the size, 2 MB for all rows instead of 16.
          --compress-mode=size
          -Werror=all-warnings
          # A kernel that spills or indexes registers at run time is an error, not a slow kernel.
          -Xptxas=--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error
          # Registers and memory of each kernel, which the launcher below keeps.
          -Xptxas=-v
          -Xcompiler=-Wall,-Wextra,-Werror,-fvisibility=hidden)
set_target_properties(hopyard_sm90 PROPERTIES CUDA_COMPILER_LAUNCHER
                                              ${CMAKE_SOURCE_DIR}/cmake/keep_ptxas.sh)
# One table for the kernels, the host that chooses from it, and the tests: rows.h must mean the same
# everywhere.
if(HOPYARD_KERNELS STREQUAL "dev")
  target_compile_definitions(hopyard_options INTERFACE HOPYARD_KERNELS_DEV)
  target_compile_definitions(hopyard_sm90 PRIVATE HOPYARD_KERNELS_DEV)
elseif(NOT HOPYARD_KERNELS STREQUAL "full")
  message(FATAL_ERROR "HOPYARD_KERNELS=${HOPYARD_KERNELS}; wanted full or dev")
endif()
target_sources(hopyard PRIVATE $<TARGET_OBJECTS:hopyard_sm90>)
# cudart inside the library: the product needs a driver, not a toolkit.
target_link_libraries(hopyard PRIVATE $<BUILD_INTERFACE:CUDA::cudart_static>)
