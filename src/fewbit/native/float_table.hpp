// The kernels in floating point of one unit, over V = Vectors. Include inside an anonymous namespace only, after all others.

template <class V>
constexpr FloatKernels float_kernels_of() {
    return {dense<V>, rms_norm<V>, add<V>, gate<V>, rope<V>, attend<V>, fold<V>,
            round_groups<V>, round_groups_back<V>, best_scale<V>, round_columns<V>};
}
