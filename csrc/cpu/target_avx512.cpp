// The kernels compiled for one instruction set: CMakeLists.txt sets its flags and its name,
// BGK_TARGET.
#include "cpu/row_kernels.inl"
