# The tuning tables that come with the library, src/tune/tables/*.json, as one source file.
file(GLOB hopyard_tables CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/tune/tables/*.json)
set(hopyard_tables_source ${PROJECT_BINARY_DIR}/shipped_tables.cc)
set(hopyard_tables_arrays "")
set(hopyard_tables_rows "")
set(hopyard_tables_count 0)
foreach(table IN LISTS hopyard_tables)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${table})
  get_filename_component(name ${table} NAME)
  file(READ ${table} text HEX)
  # Bytes, since compilers need not take string literals above 64 KiB.
  string(REGEX REPLACE "(..)" "0x\\1," text "${text}")
  string(APPEND hopyard_tables_arrays
         "constexpr unsigned char kTable${hopyard_tables_count}[] = {${text}};\n")
  string(APPEND hopyard_tables_rows
         "    {\"${name}\", TextOf(kTable${hopyard_tables_count})},\n")
  math(EXPR hopyard_tables_count "${hopyard_tables_count} + 1")
endforeach()
configure_file(${PROJECT_SOURCE_DIR}/cmake/shipped_tables.cc.in ${hopyard_tables_source} @ONLY)
