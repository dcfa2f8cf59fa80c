# `cmake --install`: libraries, headers under include/ounce, and the files of find_package(ounce).
include(CMakePackageConfigHelpers)
set(config_folder ${CMAKE_INSTALL_LIBDIR}/cmake/ounce)

install(TARGETS ounce ounce_ops EXPORT ounceTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT ounceTargets NAMESPACE ounce:: DESTINATION ${config_folder})
install(DIRECTORY core kernels optim ckpt DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/ounce
        FILES_MATCHING PATTERN "*.h" PATTERN cmake EXCLUDE PATTERN python EXCLUDE)
install(FILES core/ounce.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/ounce)

configure_package_config_file(core/cmake/ounceConfig.cmake.in ${ounce_BINARY_DIR}/ounceConfig.cmake
                              INSTALL_DESTINATION ${config_folder} NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${ounce_BINARY_DIR}/ounceConfigVersion.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${ounce_BINARY_DIR}/ounceConfig.cmake ${ounce_BINARY_DIR}/ounceConfigVersion.cmake
              core/cmake/FindLibTorch.cmake
        DESTINATION ${config_folder})
