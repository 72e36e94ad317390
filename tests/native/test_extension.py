"""The extension is there: without it most tests of kernels would be skipped, and nobody would notice."""

from fewbit.ops.extension import load_native


def test_the_native_extension_is_built_and_loads():
    assert load_native() is not None
