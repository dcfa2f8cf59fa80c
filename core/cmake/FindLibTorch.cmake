# LibTorch::LibTorch from a PyTorch wheel or a LibTorch archive, without TorchConfig (which forces one
# global list of GPU architectures, fails without a CUDA toolkit and warns on every configure).
#
# Looks in LibTorch_ROOT, CMAKE_PREFIX_PATH, .deps/venv, then the python3 on the PATH.
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
  if(EXISTS ${LibTorch_DIRECTORY}/lib/libtorch_cuda.so)
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
  find_package(CUDAToolkit 13.0 QUIET)
  set(OUNCE_WITH_CUDA ${CUDAToolkit_FOUND})
endif()
if(OUNCE_CUDA STREQUAL "ON" AND NOT OUNCE_WITH_CUDA)
  message(FATAL_ERROR "OUNCE_CUDA=ON needs a LibTorch with CUDA and a CUDA 13 toolkit: "
    "LibTorch ${LibTorch_DIRECTORY}, toolkit found: ${CUDAToolkit_FOUND}")
endif()

if(NOT TARGET LibTorch::LibTorch)
  add_library(LibTorch::LibTorch INTERFACE IMPORTED)
  set(_lib ${LibTorch_DIRECTORY}/lib)
  set_target_properties(LibTorch::LibTorch PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES
      "${LibTorch_DIRECTORY}/include;${LibTorch_DIRECTORY}/include/torch/csrc/api/include"
    INTERFACE_LINK_LIBRARIES "${_lib}/libtorch_cpu.so;${_lib}/libc10.so")
  target_link_options(LibTorch::LibTorch INTERFACE "LINKER:-rpath,${_lib}")
  if(OUNCE_WITH_CUDA)
    target_link_libraries(LibTorch::LibTorch INTERFACE
      -Wl,--no-as-needed ${_lib}/libtorch_cuda.so ${_lib}/libc10_cuda.so CUDA::cudart)
  endif()
endif()
