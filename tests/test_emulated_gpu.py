"""The GPU that tests emulate computes what NVIDIA documents, and reports what a GPU would do without a word."""

import numpy as np
import pytest
import torch

from tests.emulated_gpu.machine import Launch
from tests.emulated_gpu.memory import Fault
from tests.emulated_gpu.ptx import parse

NAN = 0x7FFFFFFF


def bits(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


def run(body: str, *tensors: torch.Tensor, n_blocks: int = 1, threads: int = 32) -> None:
    """Run instructions in a kernel whose parameters are the addresses of tensors, in %rd0, %rd1 ...

    %r0 is the thread, %r1 the block, %rd9 4 times the thread.
    """
    parameters = ",\n".join(f".param .u64 .ptr .global .align 1 p{i}" for i in range(len(tensors)))
    loads = "\n".join(f"ld.param.b64 %rd{i}, [p{i}];" for i in range(len(tensors)))
    text = f""".visible .entry kernel(
{parameters}
)
.reqntid {threads}
{{
.reg .b32 %r<99>;
{loads}
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
mul.wide.u32 %rd9, %r0, 4;
{body}
ret;
}}
"""
    Launch(parse(text), n_blocks, 1, [t.data_ptr() for t in tensors], 1024).run()


def evaluate(instruction: str, *operands: int) -> int:
    """The result of an instruction on constants: registers are named d, a, b, c; 64-bit ones D, A, B, C."""
    names = {"d": "%r10", "a": "%r11", "b": "%r12", "c": "%r13", "D": "%rd10", "A": "%rd11", "B": "%rd12", "p": "%p1"}
    opcode, _, rest = instruction.partition(" ")
    used = [x.strip() for x in rest.split(",")]
    wide = used[0] == "D"
    lines = [
        f"mov.b{64 if x.isupper() else 32} {names[x]}, {value};"
        for x, value in zip((x for x in used[1:] if x in names), operands, strict=True)
    ]
    lines.append(f"{opcode} {', '.join(names.get(x, x) for x in used)};")
    if used[0] == "p":
        lines.append("selp.b32 %r10, 1, 0, %p1;")
    out = torch.zeros(32, dtype=torch.int64)
    lines.append(f"shl.b64 %rd9, %rd9, 1; add.s64 %rd1, %rd0, %rd9; st.global.b{64 if wide else 32} [%rd1], "
                 f"{names['D'] if wide else '%r10'};")  # fmt: skip
    run("\n".join(lines), out)
    assert (out == out[0]).all()
    return int(out[0]) & (2**64 - 1)


@pytest.mark.parametrize(
    ("instruction", "operands", "result"),
    [
        ("add.s32 d, a, b", (0xFFFFFFFF, 2), 1),
        ("sub.s64 D, A, B", (0, 1), 2**64 - 1),
        ("mul.lo.s32 d, a, b", (0x80000001, 2), 2),
        ("mul.hi.u32 d, a, b", (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFE),
        ("mul.wide.s32 D, a, b", (-3, 5), 2**64 - 15),
        ("mad.wide.u32 D, a, b, 7", (0xFFFFFFFF, 2), 2 * 0xFFFFFFFF + 7),
        ("mad.lo.s32 d, a, b, 7", (-3, 5), 2**32 - 8),
        ("div.s32 d, a, b", (-7, 2), 2**32 - 3),  # towards zero
        ("rem.s32 d, a, b", (-7, 2), 2**32 - 1),
        ("div.s64 D, A, B", (-(2**63), 3), 2**64 - 2**63 // 3),
        ("div.u32 d, a, b", (0xFFFFFFFF, 16), 0x0FFFFFFF),
        ("shl.b32 d, a, b", (1, 40), 0),  # longer than the register
        ("shr.u64 D, A, b", (2**63, 63), 1),
        ("shr.s32 d, a, b", (-8, 99), 0xFFFFFFFF),
        ("bfe.u32 d, a, 23, 8", (bits(1.0),), 127),
        ("bfe.s32 d, a, 5, 1", (0x20,), 0xFFFFFFFF),
        ("popc.b32 d, a", (0xF0F0,), 8),
        ("prmt.b32 d, a, b, 0x3340U", (0x11223344, 0x55667788), 0x11118844),
        ("prmt.b32 d, a, b, 0x7770U", (0x11223344, 0x55667788), 0x55555544),
        ("prmt.b32 d, a, b, 0x8888U", (0x80, 0), 0xFFFFFFFF),  # the byte's sign
        ("selp.b32 d, a, b, 1", (5, 6), 5),
        ("max.s32 d, a, b", (-1, 1), 1),
        ("max.u32 d, a, b", (-1, 1), 0xFFFFFFFF),
        ("setp.lt.s32 p, a, b", (-1, 1), 1),
        ("setp.lt.u32 p, a, b", (-1, 1), 0),
        ("cvt.s64.s32 D, a", (-2,), 2**64 - 2),
        ("cvt.u64.u32 D, a", (-2,), 2**32 - 2),
        ("cvt.rn.f32.s32 d, a", (2**24 + 1,), bits(2**24)),  # a tie, to even
        ("cvt.rn.f32.s32 d, a", (2**24 + 3,), bits(2**24 + 4)),
        ("add.rn.f32 d, a, b", (bits(1e-45), bits(1e-45)), 2),  # denormals stay
        ("mul.rn.f32 d, a, b", (bits(float("inf")), 0), NAN),  # x86 would say 0xFFC00000
        ("sqrt.rn.f32 d, a", (bits(-1.0),), NAN),
        ("div.rn.f32 d, a, b", (bits(1.0), bits(3.0)), 0x3EAAAAAB),
        ("neg.f32 d, a", (0,), 0x80000000),
        ("min.f32 d, a, b", (NAN, bits(2.0)), bits(2.0)),
        ("min.f32 d, a, b", (0, 0x80000000), 0x80000000),  # -0 is less
        ("max.f32 d, a, b", (0x80000000, 0), 0),
        ("abs.f32 d, a", (0x80000000,), 0),
        ("setp.num.f32 p, a, b", (NAN, 0), 0),
        ("setp.ne.f32 p, a, b", (NAN, NAN), 0),
        ("cvt.rn.f16x2.f32 d, a, b", (bits(1.0), bits(-2.0)), 0x3C00C000),
        ("add.rn.f32x2 D, A, B", (bits(1.0) << 32 | bits(2.0), bits(3.0) << 32 | NAN), bits(4.0) << 32 | NAN),
    ],
)
def test_results_of_instructions(instruction: str, operands: tuple[int, ...], result: int) -> None:
    assert evaluate(instruction, *operands) == result


@pytest.mark.parametrize(
    "instruction",
    [
        *("fma.rn.f32 d, a, b, c", "sqrt.approx.f32 d, a", "mul.ftz.f32 d, a, b"),
        *("max.NaN.f32 d, a, b", "cvt.rzi.s32.f32 d, a", "mad.rn.f32 d, a, b, c"),
    ],
)
def test_what_has_no_defined_bits_or_is_in_no_kernel_is_refused(instruction: str) -> None:
    with pytest.raises(NotImplementedError, match=instruction.split()[0]):
        evaluate(instruction, *range(sum(x in ("a", "b", "c") for x in instruction.split(" ", 1)[1].split(", "))))


def test_threads_part_and_meet_again() -> None:
    """Odd threads double thrice, even ones add once; then all exchange with their neighbours."""
    out = torch.zeros(64, dtype=torch.int32)
    run(
        """
        add.s64 %rd1, %rd0, %rd9;
        mov.b32 %r2, 0;
        mov.b32 %r3, %r0;
        and.b32 %r4, %r0, 1;
        setp.eq.b32 %p1, %r4, 0;
        @%p1 bra $L__EVEN;
        $L__LOOP:
        shl.b32 %r3, %r3, 1;
        add.s32 %r2, %r2, 1;
        setp.lt.s32 %p2, %r2, 3;
        @%p2 bra $L__LOOP;
        bra.uni $L__MEET;
        $L__EVEN:
        add.s32 %r3, %r3, 100;
        $L__MEET:
        shfl.sync.bfly.b32 %r5, %r3, 1, 31, -1;
        redux.sync.max.s32 %r6, %r3, -1;
        sub.s32 %r5, %r6, %r5;
        st.global.b32 [%rd1], %r5;
        """,
        out,
        threads=64,
    )
    own = np.array([8 * t if t % 2 else t + 100 for t in range(64)])
    most = np.repeat([own[:32].max(), own[32:].max()], 32)
    assert out.tolist() == (most - own[np.arange(64) ^ 1]).tolist()


SHARED = """
        cvt.u32.u64 %r2, %rd9;
        st.shared.b32 [%r2], %r0;
        {barrier}
        xor.b32 %r3, %r2, 128;
        ld.shared.b32 %r4, [%r3];
        add.s64 %rd1, %rd0, %rd9;
        st.global.b32 [%rd1], %r4;
"""


def test_a_barrier_orders_shared_memory_and_without_it_the_exchange_is_a_fault() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    run(SHARED.format(barrier="bar.sync 0;"), out, threads=64)
    assert out.tolist() == [t ^ 32 for t in range(64)]
    with pytest.raises(Fault, match="nothing orders"):
        run(SHARED.format(barrier=""), out, threads=64)


def test_a_barrier_that_some_threads_never_reach_is_a_fault() -> None:
    body = "setp.lt.s32 %p1, %r0, 32; @%p1 bra $L__END; bar.sync 0; $L__END:"
    with pytest.raises(Fault, match="wait at a barrier for warps that have left"):
        run(body.replace("; ", ";\n") + "\n", torch.zeros(1), threads=64)


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("st.global.b32 [%rd0+32], %r0;", "4 bytes at .* are in no tensor"),
        ("st.global.v2.b32 [%rd0+4], {%r0, %r0};", "8 bytes at .* are not aligned"),
        ("st.global.b32 [%rd1], %r0;", "in no tensor"),
        ("st.shared.b32 [1024], %r0;", "of 1024 bytes of shared memory"),
    ],
)
def test_addresses_outside_and_odd_ones_are_faults(store: str, message: str) -> None:
    storage = torch.zeros(64)
    tensor = torch.from_numpy(np.zeros(8, np.float32))  # memory of its own, of 32 bytes
    with pytest.raises(Fault, match=message):
        run(f"mov.b64 %rd1, 64;\n{store}", tensor)
    assert not storage.any()


def test_blocks_may_add_to_one_number_and_do_nothing_else_to_it() -> None:
    """Whatever they happen to find there: a barrier is one of a block."""
    out = torch.zeros(1, dtype=torch.int32)
    add = "mov.b32 %r2, 1;\nred.global.gpu.relaxed.add.u32 [%rd0], %r2;\n"
    body = add + "atom.global.gpu.relaxed.add.u32 %r3, [%rd0], %r2;\nbar.sync 0;\n"
    run(body, out, n_blocks=5, threads=64)
    assert out.item() == 2 * 5 * 64
    read, write = "ld.global.b32 %r4, [%rd0];", "st.global.b32 [%rd0], 7;"
    run(body + read, out, threads=64)  # one block alone
    for more in (read, write):
        with pytest.raises(Fault, match="nothing orders"):
            run(body + more, out, n_blocks=5, threads=64)
    with pytest.raises(NotImplementedError, match="acq_rel"):
        run(body.replace("relaxed", "acq_rel"), out)


def test_two_threads_that_write_different_numbers_to_one_place_are_a_fault() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(Fault, match="two threads write different numbers"):
        run("st.global.b32 [%rd0], %r0;", out)
    run("st.global.b32 [%rd0], 7;", out, threads=64)
    assert out.item() == 7
