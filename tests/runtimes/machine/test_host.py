"""The computer: what Linux says of processors, of both kinds, and of memory."""

from __future__ import annotations

from herdgraph.runtimes.machine.host import parse_cpu_info, parse_memory_info, this_host

X86 = "processor\t: 0\nmodel name\t: AMD EPYC 9654\nflags\t\t: fpu sse2 avx avx2 fma avx512f avx512_vnni\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd asimddp i8mm sve\n"


def test_processors() -> None:
    assert parse_cpu_info(X86) == ("AMD EPYC 9654", ("avx", "avx2", "fma", "avx512f", "avx512_vnni"))
    assert parse_cpu_info(ARM) == ("", ("asimd", "asimddp", "i8mm", "sve"))
    assert parse_cpu_info("") == ("", ())


def test_memory() -> None:
    assert parse_memory_info("MemTotal:       2048 kB\nMemFree:  1 kB\nMemAvailable:   1024 kB\n") == (2 << 20, 1 << 20)
    assert parse_memory_info("") == (0, 0)


def test_this_host() -> None:
    found = this_host()
    assert found.cores >= 1
    assert found.python.startswith("3.")
