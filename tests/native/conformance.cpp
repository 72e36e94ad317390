// Runs the portable kernels on cases that the torch reference computed and compares every bit. It needs neither
// Python nor threads, so it tests the kernels on machines that torch does not reach.
//
// Usage: conformance FILE, as conformance_cases.py writes it: cases one after the other, each the operator's name, a
// label, the number of its fields, then the name and the bytes of every field. Numbers are 64-bit and little-endian,
// names and bytes have their length in front. Fields "expected NAME" are the results.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "product.hpp"
#include "rotate.hpp"

namespace {

using namespace fewbit;

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "arrays are read as they are in the file");

[[noreturn]] void give_up(const std::string& message) {
    std::fprintf(stderr, "conformance: %s\n", message.c_str());
    std::exit(2);
}

// One call of one operator. Every array is an allocation of its own and of its exact size.
class Case {
public:
    // False at the end of the file.
    bool read(std::ifstream& file) {
        if (file.peek() == std::ifstream::traits_type::eof()) return false;
        operation = text(file);
        label = text(file);
        fields_.clear();
        for (int64_t left = number(file); left > 0; --left) {
            const std::string name = text(file);
            fields_[name] = bytes(file);
        }
        return true;
    }

    bool has(const std::string& field) const { return fields_.count(field) != 0; }

    // Null for an array that the case does not have.
    template <class T>
    const T* array(const std::string& field) const {
        return has(field) ? reinterpret_cast<const T*>(fields_.at(field).data()) : nullptr;
    }

    template <class T = int64_t>
    T value(const std::string& field) const {
        T found;
        if (!has(field) || fields_.at(field).size() != sizeof found) give_up(operation + " lacks " + field);
        std::memcpy(&found, fields_.at(field).data(), sizeof found);
        return found;
    }

    int small(const std::string& field) const { return static_cast<int>(value(field)); }

    // Says where a result differs first.
    template <class T>
    bool same(const std::string& field, const std::vector<T>& found) const {
        if (!has("expected " + field)) give_up(operation + " lacks expected " + field);
        const std::vector<uint8_t>& expected = fields_.at("expected " + field);
        if (expected.size() != found.size() * sizeof(T)) give_up(operation + ": wrong size of " + field);
        for (size_t i = 0; i < found.size(); ++i) {
            if (std::memcmp(&found[i], expected.data() + i * sizeof(T), sizeof(T)) == 0) continue;
            std::printf("%s, %s: %s differs first at %zu of %zu\n", operation.c_str(), label.c_str(), field.c_str(), i,
                        found.size());
            return false;
        }
        return true;
    }

    std::string operation, label;

private:
    static int64_t number(std::ifstream& file) {
        int64_t value = 0;
        if (!file.read(reinterpret_cast<char*>(&value), sizeof value)) give_up("the file ends within a case");
        return value;
    }

    static std::vector<uint8_t> bytes(std::ifstream& file) {
        std::vector<uint8_t> data(static_cast<size_t>(number(file)));
        if (!file.read(reinterpret_cast<char*>(data.data()), static_cast<std::streamsize>(data.size())))
            give_up("the file ends within a case");
        return data;
    }

    static std::string text(std::ifstream& file) {
        const std::vector<uint8_t> data = bytes(file);
        return std::string(data.begin(), data.end());
    }

    std::map<std::string, std::vector<uint8_t>> fields_;
};

const Kernels& kernels = kPortableKernels;

int64_t row_groups(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// A result before the kernel has written it: nothing that a kernel would leave by accident.
template <class T>
std::vector<T> unwritten(int64_t count) {
    std::vector<T> data(static_cast<size_t>(count));
    if (count) std::memset(data.data(), 0xa5, data.size() * sizeof(T));
    return data;
}

Prologue prologue_of(const Case& given) {
    if (given.has("weight")) return Prologue::rms_norm;
    if (!given.has("up")) return Prologue::none;
    return given.small("gelu") != 0 ? Prologue::gelu_tanh : Prologue::silu;
}

bool rotate_quantize(const Case& given) {
    const int64_t tokens = given.value("tokens"), cols = given.value("cols"), group = given.value("group");
    auto q = unwritten<int8_t>(tokens * cols);
    auto scale = unwritten<float>(tokens * (cols / group));
    auto sums = unwritten<int32_t>(tokens * (cols / group));
    RotateJob job{};
    job.x = given.array<uint8_t>("x");
    job.bf16 = given.small("bf16") != 0;
    job.signs = given.array<uint8_t>("signs");
    job.q = q.data();
    job.scale = scale.data();
    job.sums = sums.data();
    job.cols = job.stride = cols;
    job.block = given.small("block");
    job.group = static_cast<int>(group);
    job.bits = given.small("bits");
    job.prologue = prologue_of(given);
    job.weight = given.array<float>("weight");
    job.up = given.array<uint8_t>("up");
    job.shift = given.array<float>("shift");
    if (job.prologue == Prologue::rms_norm) job.eps = given.value<float>("eps");
    for (int64_t token = 0; token < tokens; ++token) kernels.rotate_quantize(job, token);
    return given.same("q", q) && given.same("scale", scale) && given.same("sums", sums);
}

// As the extension does it, on one thread.
void multiply(ProductJob& job) {
    const ProductKernels& use = *kernels.product;
    const PanelKernels& panels = use.panels;
    const int64_t groups = row_groups(job.rows), scale_groups = job.cols / job.group;
    const auto scratch = std::make_unique<ProductScratch>();
    std::vector<uint16_t> scales(static_cast<size_t>(scale_groups * kMaxPanel * kTileRows));
    const int64_t blocks = (job.tokens + panels.block - 1) / panels.block;
    std::vector<int8_t> packed(static_cast<size_t>(blocks * panels.block * (panels.bytes * job.cols + 4 * scale_groups)));
    scratch->scales = scales.data();
    if (job.tokens <= use.few) {
        for (int64_t index = 0; index < groups; ++index) use.multiply_few(job, index, *scratch);
        return;
    }
    job.packed = packed.data();
    job.panels = 1;
    for (int64_t block = 0; block < blocks; ++block) panels.pack(job, block);
    for (int64_t panel = 0; panel * panels.panel < groups; ++panel) panels.multiply(job, panel, *scratch);
}

bool packed_linear(const Case& given) {
    ProductJob job{};
    job.q = given.array<int8_t>("q");
    job.input_scale = given.array<float>("scale");
    job.sums = given.array<int32_t>("sums");
    job.codes = given.array<uint8_t>("codes");
    job.scales = given.array<uint16_t>("scales");
    job.scale = given.value<float>("tensor_scale");
    job.tables = given.array<int8_t>("tables");
    job.bias = given.array<float>("bias");
    job.bf16 = given.small("bf16") != 0;
    job.tokens = given.value("tokens");
    job.rows = given.value("rows");
    job.cols = job.stride = given.value("cols");
    job.group = given.small("group");
    job.bits = given.small("bits");
    job.lane_groups = given.small("lane_groups");
    job.code = !job.tables ? Code::nibbles : job.lane_groups > 1 ? Code::lanes : Code::trellis;
    auto floats = unwritten<float>(job.bf16 ? 0 : job.tokens * job.rows);
    auto halves = unwritten<uint16_t>(job.bf16 ? job.tokens * job.rows : 0);
    job.out = job.bf16 ? static_cast<void*>(halves.data()) : floats.data();
    multiply(job);
    return job.bf16 ? given.same("out", halves) : given.same("out", floats);
}

bool trellis_dequantize(const Case& given) {
    DecodeJob job{};
    job.codes = given.array<uint8_t>("codes");
    job.scales = given.array<float>("scales");
    job.values = given.array<int8_t>("values");
    job.rows = given.value("rows");
    job.cols = given.value("cols");
    job.group = given.small("group");
    job.bits = given.small("bits");
    auto out = unwritten<float>(job.rows * job.cols);
    job.out = out.data();
    for (int64_t index = 0; index < row_groups(job.rows); ++index) kernels.decode_row_group(job, index);
    return given.same("out", out);
}

bool trellis_encode_group(const Case& given) {
    EncodeJob job{};
    job.weight = given.array<float>("weight");
    job.scales = given.array<float>("scales");
    job.inverse = given.array<float>("inverse");
    job.factor = given.array<float>("factor");
    job.levels = given.array<int16_t>("levels");
    job.rows = given.value("rows");
    job.group = given.small("group");
    job.bits = given.small("bits");
    const int64_t size = job.rows * job.group, with_factor = job.factor ? size : 0;
    auto codes = unwritten<uint8_t>(row_groups(job.rows) * 2 * job.bits * job.group);
    auto values = unwritten<float>(size);
    auto error = unwritten<float>(with_factor), weighted = unwritten<float>(with_factor);
    job.codes = codes.data();
    job.values = values.data();
    job.error = job.factor ? error.data() : nullptr;
    job.weighted = job.factor ? weighted.data() : nullptr;
    const auto work = std::make_unique<Workspace>();
    for (int64_t index = 0; index < row_groups(job.rows); ++index) kernels.encode_row_group(job, index, *work);
    if (!given.same("codes", codes) || !given.same("values", values)) return false;
    return !job.factor || (given.same("error", error) && given.same("weighted", weighted));
}

bool trellis_encode_streams(const Case& given) {
    const int64_t streams = given.value("streams"), steps = given.value("steps");
    auto symbols = unwritten<uint8_t>(streams * steps);
    const StreamJob job{given.array<int16_t>("x"), given.array<int16_t>("levels"), symbols.data(), steps,
                        given.small("bits")};
    const auto work = std::make_unique<Workspace>();
    for (int64_t index = 0; index < streams; ++index) kernels.encode_stream(job, index, *work);
    return given.same("symbols", symbols);
}

// The operators, named as in the extension.
const std::map<std::string, bool (*)(const Case&)> kOperators = {
    {"rotate_quantize", rotate_quantize},
    {"packed_linear", packed_linear},
    {"trellis_dequantize", trellis_dequantize},
    {"trellis_encode_group", trellis_encode_group},
    {"trellis_encode_streams", trellis_encode_streams},
};

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) give_up("name one file of cases");
    std::ifstream file(argv[1], std::ios::binary);
    if (!file) give_up(std::string("cannot read ") + argv[1]);
    std::map<std::string, int> counts;
    int cases = 0, failed = 0;
    for (Case given; given.read(file); ++cases) {
        const auto found = kOperators.find(given.operation);
        if (found == kOperators.end()) give_up("no operator is called " + given.operation);
        ++counts[given.operation];
        failed += found->second(given) ? 0 : 1;
    }
    for (const auto& count : counts) std::printf("%s: %d\n", count.first.c_str(), count.second);
    if (counts.size() != kOperators.size()) give_up("the file does not have cases of every operator");
    std::printf("%d cases, %d failed\n", cases, failed);
    return failed ? 1 : 0;
}
