# What every target of ours is built with. One precompiled header serves all: it is built in
# ounce_pch, and is valid only where language, definitions and code generation flags are the same,
# so everything (programs too) is compiled with -fPIC and hidden inline visibility is left alone.

function(ounce_configure_target target)
  target_compile_features(${target} PUBLIC cxx_std_20)
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF CXX_STANDARD_REQUIRED ON)
  # g++ 12 and 13 see overflows in std::string's operator+ that are not there.
  set(wrong_alarms -Wno-array-bounds -Wno-restrict -Wno-stringop-overflow)
  target_compile_options(${target} PRIVATE
    "$<$<COMPILE_LANGUAGE:CXX>:-fPIC;-Wall;-Wextra;-Wno-missing-field-initializers;${wrong_alarms};-Werror>"
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-fPIC,-Wall,-Wextra,-Werror;--expt-relaxed-constexpr>)
  target_link_libraries(${target} PUBLIC LibTorch::LibTorch)
  target_include_directories(${target} PUBLIC
    $<BUILD_INTERFACE:${ounce_BINARY_DIR}/include> $<INSTALL_INTERFACE:include>)
  if(EXISTS ${ounce_SOURCE_DIR}/.deps/include)
    target_include_directories(${target} SYSTEM PRIVATE ${ounce_SOURCE_DIR}/.deps/include)
  endif()
  if(OUNCE_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${OUNCE_SANITIZE} -fno-omit-frame-pointer -g)
    target_link_options(${target} PUBLIC -fsanitize=${OUNCE_SANITIZE})
  endif()
  if(TARGET ounce_pch AND NOT target STREQUAL ounce_pch)
    target_precompile_headers(${target} REUSE_FROM ounce_pch)
  endif()
endfunction()

function(ounce_add_library name)
  if(NOT TARGET ounce_pch)
    file(WRITE ${ounce_BINARY_DIR}/pch.cpp "// Carries the precompiled header.\n")
    add_library(ounce_pch OBJECT ${ounce_BINARY_DIR}/pch.cpp)
    ounce_configure_target(ounce_pch)
    # Named as users include it: with an absolute path no compiler cache would know it elsewhere.
    target_precompile_headers(ounce_pch PRIVATE <ounce/core/pch.h>)
  endif()
  add_library(${name} SHARED ${ARGN})
  add_library(ounce::${name} ALIAS ${name})
  ounce_configure_target(${name})
  set_target_properties(${name} PROPERTIES INSTALL_RPATH $ORIGIN)
  # Registration happens in initialisers of these libraries: keep them although nothing refers to them.
  target_link_options(${name} INTERFACE "LINKER:--no-as-needed")
endfunction()

# The CUDA language, from the nvcc of CUDACXX, of the PATH, of the PyPI wheels, or of /usr/local/cuda.
macro(ounce_enable_cuda_language)
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(CMAKE_CUDA_COMPILER nvcc
                 PATHS ${LibTorch_DIRECTORY}/../nvidia/cu13/bin /usr/local/cuda/bin REQUIRED)
  endif()
  set(CMAKE_CUDA_ARCHITECTURES ${OUNCE_CUDA_ARCHS})
  set(CMAKE_CUDA_STANDARD 20)
  # LibTorch brings libcudart as a shared library: one runtime, and wheels have no name to link it by.
  set(CMAKE_CUDA_RUNTIME_LIBRARY None)
  set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
  enable_language(CUDA)
endmacro()
