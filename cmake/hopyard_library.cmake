# The library: every .cc below src/ except tests, oracles' tests, the CLI and the extension.
file(GLOB_RECURSE hopyard_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/*.cc)
list(FILTER hopyard_sources EXCLUDE REGEX "(_test|_bench|_fuzz)\\.cc$|/src/(cli|ffi)/")
# The Hopper backend's host side, or what says that there is none.
if(HOPYARD_CUDA)
  list(FILTER hopyard_sources EXCLUDE REGEX "/src/plan/no_sm90\\.cc$")
else()
  list(FILTER hopyard_sources EXCLUDE REGEX "/src/plan/sm90/")
endif()
include(hopyard_tables)
add_library(hopyard ${hopyard_sources} ${hopyard_tables_source})
add_library(hopyard::hopyard ALIAS hopyard)
target_include_directories(
  hopyard
  PUBLIC $<BUILD_INTERFACE:${CMAKE_SOURCE_DIR}/include> $<INSTALL_INTERFACE:include>
  PRIVATE ${CMAKE_SOURCE_DIR}/src)
target_compile_features(hopyard PUBLIC cxx_std_20)
target_link_libraries(hopyard PRIVATE $<BUILD_INTERFACE:hopyard_options>
                                      $<BUILD_INTERFACE:fmt::fmt-header-only>
                                      $<BUILD_INTERFACE:nlohmann_json::nlohmann_json>)
target_link_libraries(hopyard PRIVATE OpenMP::OpenMP_CXX)

# One translation unit per instruction set, chosen at run time: *_avx2.cc and *_avx512.cc. Their
# flags reach nothing else, so the library runs on any x86-64.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(hopyard_avx2_flags "-mavx2;-mfma;-mf16c")
  set(hopyard_avx512_flags
      "-mavx512f;-mavx512bw;-mavx512vl;-mavx512dq;-mavx2;-mfma;-mf16c;-mprefer-vector-width=512")
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # g++ 12's own AVX-512 headers trip these warnings (GCC bug 105593).
    list(APPEND hopyard_avx512_flags -Wno-uninitialized -Wno-maybe-uninitialized)
  endif()
  foreach(source IN LISTS hopyard_sources)
    if(source MATCHES "_avx2\\.cc$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${hopyard_avx2_flags}")
    elseif(source MATCHES "_avx512\\.cc$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${hopyard_avx512_flags}")
    endif()
  endforeach()
endif()
