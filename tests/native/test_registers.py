"""Products on registers, which measure a machine's arithmetic: every instruction set says truly how many it did."""

import pytest

from fewbit.ops.extension import load_native

native = load_native()
pytestmark = pytest.mark.skipif(native is None, reason="the native extension is not built")
ISAS = [*native.available_isas(), *native.emulated_isas()] if native else []
ASKED = 10_000_000


@pytest.fixture
def use():
    """`use(isa, threads)` until the test ends."""

    def use_both(isa: str, threads: int) -> None:
        native.select_isa(isa)
        native.set_num_threads(threads)

    before = native.isa(), native.num_threads()
    yield use_both
    use_both(*before)


@pytest.mark.parametrize("isa", ISAS)
def test_as_many_operations_are_done_as_asked_for_in_steps_that_all_threads_share(use, isa):
    use(isa, 1)
    step = native.multiply_registers(1)
    for threads in (1, 2, 3):
        use(isa, threads)
        assert native.multiply_registers(1) == threads * step
        done = native.multiply_registers(ASKED)
        assert done % (threads * step) == 0
        assert ASKED <= done < ASKED + threads * step
        assert native.multiply_registers(done) == done
        assert native.multiply_registers(done + 1) == done + threads * step


@pytest.mark.parametrize("operations", [0, -1, (1 << 50) + 1])
def test_no_operations_and_more_than_anyone_waits_for_are_refused(operations):
    with pytest.raises(ValueError, match=r"1 to 2\^50"):
        native.multiply_registers(operations)
