// SPDX-License-Identifier: MIT
#include <ounce/ckpt/hdf5_types.h>
#include <ounce/ckpt/storage_error.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace ounce::ckpt {
namespace {

Handle brain_float_type() {
  Handle type(valid(H5Tcopy(H5T_IEEE_F32LE), "make a type"), H5Tclose);
  // Fields first: the size may only shrink around them.
  done(H5Tset_fields(type, 15, 7, 8, 0, 7), "make bfloat16");
  done(H5Tset_precision(type, 16), "make bfloat16");
  done(H5Tset_size(type, 2), "make bfloat16");
  done(H5Tset_ebias(type, 127), "make bfloat16");
  return type;
}

Handle complex_type(hid_t part, size_t bytes) {
  Handle type(valid(H5Tcreate(H5T_COMPOUND, 2 * bytes), "make a type"), H5Tclose);
  done(H5Tinsert(type, "r", 0, part), "make complex");
  done(H5Tinsert(type, "i", bytes, part), "make complex");
  return type;
}

Handle boolean_type() {
  Handle type(valid(H5Tenum_create(H5T_STD_I8LE), "make a type"), H5Tclose);
  const signed char no = 0, yes = 1;
  done(H5Tenum_insert(type, "FALSE", &no), "make bool");
  done(H5Tenum_insert(type, "TRUE", &yes), "make bool");
  return type;
}

}  // namespace

std::string last_error() {
  std::string text = "unknown error";
  H5Ewalk2(
      H5E_DEFAULT, H5E_WALK_UPWARD,
      [](unsigned n, const H5E_error2_t* error, void* data) -> herr_t {
        if (n == 0 && error->desc != nullptr) *static_cast<std::string*>(data) = error->desc;
        return 0;
      },
      &text);
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

void fail_hdf5(const std::string& what) {
  const auto reason = last_error();
  const std::string_view before = "errno = ";
  const auto at = reason.find(before);
  throw StorageError(StorageError::Kind::kIo, "[checkpoint] libhdf5 cannot " + what + ": " + reason,
                     at == std::string::npos ? 0 : std::atoi(&reason[at + before.size()]));
}

Handle type_of(const std::string& dtype) {
  if (dtype == "bfloat16") return brain_float_type();
  if (dtype == "bool") return boolean_type();
  if (dtype == "complex64") return complex_type(H5T_IEEE_F32LE, 4);
  if (dtype == "complex128") return complex_type(H5T_IEEE_F64LE, 8);
  hid_t type = H5T_STD_U8LE;  // also the 8-bit floats, whose attribute torch_dtype names them
  if (dtype == "float32") type = H5T_IEEE_F32LE;
  if (dtype == "float64") type = H5T_IEEE_F64LE;
  if (dtype == "int8") type = H5T_STD_I8LE;
  if (dtype == "int16") type = H5T_STD_I16LE;
  if (dtype == "int32") type = H5T_STD_I32LE;
  if (dtype == "int64") type = H5T_STD_I64LE;
  if (dtype == "uint16") type = H5T_STD_U16LE;
  if (dtype == "uint32") type = H5T_STD_U32LE;
  if (dtype == "uint64") type = H5T_STD_U64LE;
  // float16 is IEEE binary16, made from binary32 as brain_float_type() is.
  if (dtype == "float16") {
    Handle half(valid(H5Tcopy(H5T_IEEE_F32LE), "make a type"), H5Tclose);
    done(H5Tset_fields(half, 15, 10, 5, 0, 10), "make float16");
    done(H5Tset_precision(half, 16), "make float16");
    done(H5Tset_size(half, 2), "make float16");
    done(H5Tset_ebias(half, 15), "make float16");
    return half;
  }
  return Handle(valid(H5Tcopy(type), "make a type"), H5Tclose);
}

}  // namespace ounce::ckpt
