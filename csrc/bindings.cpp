// golf_kernels._C: wraps the functions of launchers.h as Python functions that take addresses and sizes. Only this file
// includes pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "launchers.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <typename Target = void>
Target* pointer(Address address) {
    return reinterpret_cast<Target*>(address);
}

// the table has five integers per matrix: addresses of packed, scales and values, then rows and columns
std::vector<GolfInt6Matrix> matrices_from(const std::vector<int64_t>& table) {
    if (table.size() % 5 != 0) throw std::invalid_argument("int6 table: expected five integers per matrix");
    std::vector<GolfInt6Matrix> matrices;
    for (size_t i = 0; i < table.size(); i += 5) {
        matrices.push_back({pointer<>(table[i]), pointer<>(table[i + 1]), pointer<>(table[i + 2]), table[i + 3],
                            table[i + 4]});
    }
    return matrices;
}

void check_cpu(int error) {
    if (error == GOLF_UNSUPPORTED_DTYPE) throw std::runtime_error("golf_kernels._C: dtype not implemented on the CPU");
    if (error != GOLF_OK) throw std::runtime_error("golf_kernels._C: size not implemented on the CPU");
}

#ifdef GOLF_WITH_CUDA
void check_cuda(int error) {
    if (error != 0) {
        throw std::runtime_error("CUDA error " + std::to_string(error) + ": " + golf_cuda_error_text(error));
    }
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
    using release_gil = py::call_guard<py::gil_scoped_release>;
    module.attr("abi") = GOLF_ABI;
    module.attr("float32") = static_cast<int>(GOLF_FLOAT32);
    module.attr("float16") = static_cast<int>(GOLF_FLOAT16);
    module.attr("bfloat16") = static_cast<int>(GOLF_BFLOAT16);
    module.attr("float64") = static_cast<int>(GOLF_FLOAT64);
    module.attr("gptq_max_columns") = GOLF_GPTQ_MAX_COLUMNS;

    module.def(
        "int6_pack_cpu",
        [](Address codes, Address packed, int64_t count) {
            int64_t first_bad = -1;
            check_cpu(golf_int6_pack_cpu(pointer<>(codes), pointer<>(packed), count, &first_bad));
            return first_bad;
        },
        release_gil());
    module.def(
        "int6_unpack_cpu",
        [](Address packed, Address codes, int64_t count) {
            check_cpu(golf_int6_unpack_cpu(pointer<>(packed), pointer<>(codes), count));
        },
        release_gil());
    module.def(
        "int6_dequantize_cpu",
        [](const std::vector<int64_t>& table, int scale_dtype, int value_dtype) {
            const auto matrices = matrices_from(table);
            check_cpu(golf_int6_dequantize_cpu(matrices.data(), matrices.size(), scale_dtype, value_dtype));
        },
        release_gil());
    module.def(
        "int6_fake_quantize_cpu",
        [](Address weight, Address scales, Address result, int64_t rows, int64_t columns) {
            check_cpu(golf_int6_fake_quantize_cpu(pointer<>(weight), pointer<>(scales), pointer<>(result), rows,
                                                  columns));
        },
        release_gil());
    module.def(
        "gptq_block_cpu",
        [](Address work, Address lower, Address scales, Address codes, Address errors, int64_t batch, int64_t columns,
           int64_t rows, int limit, int dtype) {
            check_cpu(golf_gptq_block_cpu(pointer<>(work), pointer<>(lower), pointer<>(scales), pointer<>(codes),
                                          pointer<>(errors), batch, columns, rows, limit, dtype));
        },
        release_gil());

#ifdef GOLF_WITH_CUDA
    module.def("cuda_probe", [] { check_cuda(golf_cuda_probe()); }, release_gil());
    module.def(
        "int6_pack_cuda",
        [](Address codes, Address packed, int64_t count, Address first_bad, Address stream) {
            check_cuda(golf_int6_pack_cuda(pointer<>(codes), pointer<>(packed), count, pointer<>(first_bad),
                                           pointer<>(stream)));
        },
        release_gil());
    module.def(
        "int6_unpack_cuda",
        [](Address packed, Address codes, int64_t count, Address stream) {
            check_cuda(golf_int6_unpack_cuda(pointer<>(packed), pointer<>(codes), count, pointer<>(stream)));
        },
        release_gil());
    module.def(
        "int6_dequantize_cuda",
        [](const std::vector<int64_t>& table, int scale_dtype, int value_dtype, Address stream) {
            const auto matrices = matrices_from(table);
            check_cuda(golf_int6_dequantize_cuda(matrices.data(), matrices.size(), scale_dtype, value_dtype,
                                                 pointer<>(stream)));
        },
        release_gil());
    module.def(
        "int6_fake_quantize_cuda",
        [](Address weight, Address scales, Address result, int64_t rows, int64_t columns, int dtype, Address stream) {
            check_cuda(golf_int6_fake_quantize_cuda(pointer<>(weight), pointer<>(scales), pointer<>(result), rows,
                                                    columns, dtype, pointer<>(stream)));
        },
        release_gil());
    module.def(
        "gptq_block_cuda",
        [](Address work, Address lower, Address scales, Address codes, Address errors, int64_t batch, int64_t columns,
           int64_t rows, int limit, int dtype, Address stream) {
            check_cuda(golf_gptq_block_cuda(pointer<>(work), pointer<>(lower), pointer<>(scales), pointer<>(codes),
                                            pointer<>(errors), batch, columns, rows, limit, dtype, pointer<>(stream)));
        },
        release_gil());
#endif
}
