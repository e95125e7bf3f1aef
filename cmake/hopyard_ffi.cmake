# The extension of the Python package, over the headers and the library of the apache-tvm-ffi wheel
# of the Python in use (its own CMake package wants a newer CMake than Debian 12 has). With
# HOPYARD_FFI=AUTO a Python without the wheel means no extension.
find_package(Python3 3.11 COMPONENTS Interpreter)
execute_process(
  COMMAND ${Python3_EXECUTABLE} -m tvm_ffi.config --libdir
  OUTPUT_QUIET ERROR_QUIET RESULT_VARIABLE hopyard_tvm_ffi_missing)
if(HOPYARD_FFI STREQUAL "AUTO" AND (NOT Python3_FOUND OR hopyard_tvm_ffi_missing))
  message(STATUS "No Python extension: HOPYARD_FFI=AUTO, and ${Python3_EXECUTABLE} has no "
                 "apache-tvm-ffi")
  return()
endif()
function(hopyard_tvm_ffi_config flag result)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -m tvm_ffi.config ${flag}
    OUTPUT_VARIABLE output
    ERROR_VARIABLE errors
    RESULT_VARIABLE status
    OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "HOPYARD_FFI=ON needs apache-tvm-ffi in ${Python3_EXECUTABLE}: "
                        "${Python3_EXECUTABLE} -m pip install apache-tvm-ffi\n${errors}")
  endif()
  set(${result} ${output} PARENT_SCOPE)
endfunction()
hopyard_tvm_ffi_config(--includedir hopyard_tvm_ffi_include)
hopyard_tvm_ffi_config(--dlpack-includedir hopyard_dlpack_include)
hopyard_tvm_ffi_config(--libdir hopyard_tvm_ffi_libdir)

file(GLOB hopyard_ffi_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/ffi/*.cc)
add_library(hopyard_ffi MODULE ${hopyard_ffi_sources})
target_include_directories(hopyard_ffi SYSTEM PRIVATE ${hopyard_tvm_ffi_include}
                                                      ${hopyard_dlpack_include})
target_link_libraries(hopyard_ffi PRIVATE hopyard hopyard_options
                                          ${hopyard_tvm_ffi_libdir}/libtvm_ffi.so)
# In site-packages the two packages are neighbours. `import tvm_ffi` has loaded the library by then;
# the path serves tools that open the extension on their own.
set_target_properties(hopyard_ffi PROPERTIES BUILD_RPATH ${hopyard_tvm_ffi_libdir}
                                             INSTALL_RPATH "$ORIGIN/../tvm_ffi/lib")
install(TARGETS hopyard_ffi LIBRARY DESTINATION hopyard COMPONENT python)
