# LibTorch::LibTorch from a PyTorch wheel or a LibTorch archive, without TorchConfig (which forces one
# global list of GPU architectures, fails without a CUDA toolkit and warns on every configure).
#
# Looks in LibTorch_ROOT, CMAKE_PREFIX_PATH, .deps/venv, then the python3 on the PATH.
# OUNCE_CUDA = ON | OFF | AUTO decides whether the CUDA half is used. It needs CUDA 13's headers and
# runtime for host code: of CUDAToolkit_ROOT, else of the wheels beside LibTorch, else of the system.
# Sets LibTorch_DIRECTORY, LibTorch_VERSION, LibTorch_HAS_CUDA and OUNCE_WITH_CUDA.
if(NOT LibTorch_DIRECTORY)
  set(_hints ${LibTorch_ROOT} $ENV{LibTorch_ROOT} ${CMAKE_PREFIX_PATH})
  foreach(_python ${ounce_SOURCE_DIR}/.deps/venv/bin/python3 python3)
    execute_process(
      COMMAND ${_python} -c "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
      OUTPUT_VARIABLE _found OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(_found)
      list(APPEND _hints ${_found})
    endif()
  endforeach()
  find_path(LibTorch_DIRECTORY NAMES include/torch/csrc/api/include/torch/torch.h
            HINTS ${_hints} NO_DEFAULT_PATH)
endif()
if(LibTorch_DIRECTORY)
  file(STRINGS ${LibTorch_DIRECTORY}/include/torch/headeronly/version.h _version
       REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH)")
  string(REGEX REPLACE "[^0-9;]" "" _version "${_version}")
  list(JOIN _version "." LibTorch_VERSION)
  # The wheel's CUDA half loads only with the other wheels of its full set beside it.
  set(_wheels ${LibTorch_DIRECTORY}/../nvidia)
  if(EXISTS ${LibTorch_DIRECTORY}/lib/libtorch_cuda.so AND (EXISTS ${_wheels}/cudnn OR NOT EXISTS ${_wheels}))
    set(LibTorch_HAS_CUDA TRUE)
  endif()
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch REQUIRED_VARS LibTorch_DIRECTORY
  VERSION_VAR LibTorch_VERSION
  REASON_FAILURE_MESSAGE "Install it with: pip install torch==2.11.0, or pass -DLibTorch_ROOT=DIR.")

if(NOT DEFINED OUNCE_CUDA)
  set(OUNCE_CUDA AUTO)
endif()
set(OUNCE_WITH_CUDA FALSE)
if(OUNCE_CUDA AND LibTorch_HAS_CUDA)
  set(_roots ${CUDAToolkit_ROOT} ${_wheels}/cu13 $ENV{CUDA_HOME} /usr/local/cuda)
  # cuda_runtime.h needs crt/, which the runtime wheel lacks; a toolkit of another CUDA is passed over.
  function(_is_cuda_13 result path)
    if(EXISTS ${path}/cuda_runtime_api.h)
      file(STRINGS ${path}/cuda_runtime_api.h _line REGEX "#define CUDART_VERSION +13")
    endif()
    if(NOT _line)
      set(${result} FALSE PARENT_SCOPE)
    endif()
  endfunction()
  find_path(OUNCE_CUDA_INCLUDE_DIR NAMES crt/host_config.h HINTS ${_roots} VALIDATOR _is_cuda_13
            PATH_SUFFIXES include targets/x86_64-linux/include NO_DEFAULT_PATH)
  find_file(OUNCE_CUDA_RUNTIME NAMES libcudart.so.13 HINTS ${_roots}
            PATH_SUFFIXES lib lib64 targets/x86_64-linux/lib NO_DEFAULT_PATH)
  mark_as_advanced(OUNCE_CUDA_INCLUDE_DIR OUNCE_CUDA_RUNTIME)
  if(OUNCE_CUDA_INCLUDE_DIR AND OUNCE_CUDA_RUNTIME)
    set(OUNCE_WITH_CUDA TRUE)
  endif()
endif()
if(OUNCE_CUDA STREQUAL "ON" AND NOT OUNCE_WITH_CUDA)
  message(FATAL_ERROR "OUNCE_CUDA=ON needs a LibTorch with CUDA and CUDA 13: LibTorch ${LibTorch_DIRECTORY}, "
    "its CUDA half: ${LibTorch_HAS_CUDA}, headers: ${OUNCE_CUDA_INCLUDE_DIR}, runtime: ${OUNCE_CUDA_RUNTIME}. "
    "Install them with: pip install torch==2.11.0, or pass -DCUDAToolkit_ROOT=DIR.")
endif()

if(NOT TARGET LibTorch::LibTorch)
  add_library(LibTorch::LibTorch INTERFACE IMPORTED GLOBAL)
  set(_lib ${LibTorch_DIRECTORY}/lib)
  set_target_properties(LibTorch::LibTorch PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES
      "${LibTorch_DIRECTORY}/include;${LibTorch_DIRECTORY}/include/torch/csrc/api/include"
    INTERFACE_LINK_LIBRARIES "${_lib}/libtorch_cpu.so;${_lib}/libc10.so")
  target_link_options(LibTorch::LibTorch INTERFACE "LINKER:-rpath,${_lib}")
  if(OUNCE_WITH_CUDA)
    target_include_directories(LibTorch::LibTorch INTERFACE ${OUNCE_CUDA_INCLUDE_DIR})
    # Nothing may refer to libtorch_cuda by name; its operators register when it is loaded.
    target_link_libraries(LibTorch::LibTorch INTERFACE
      -Wl,--no-as-needed ${_lib}/libtorch_cuda.so ${_lib}/libc10_cuda.so ${OUNCE_CUDA_RUNTIME})
  endif()
endif()
