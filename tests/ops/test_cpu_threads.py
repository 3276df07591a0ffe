"""The CPU kernels among threads and processes: same bits, no crash, no deadlock."""

import multiprocessing
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("numba")
from numba import types

from cpu_cases import by_kernels, corners, make_case
from v2m.ops.cpu import jobs, parallel


@pytest.fixture
def case():
    return (*make_case(3, 5, 7, 32), corners())


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_same(results, expected):
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


def test_the_same_bits_at_any_number_of_threads_and_every_time(case, set_threads):
    set_threads(1)
    expected = by_kernels(*case)
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        for _ in range(25):
            assert_same(by_kernels(*case), expected)


def test_two_threads_of_the_interpreter_at_once(case, set_threads):
    set_threads(2)
    other = (*make_case(2, 6, 3, 48), corners(2, 2))
    expected = [by_kernels(*each) for each in (case, other)]
    failures, start = [], threading.Barrier(4)

    def work(index):
        try:
            start.wait()
            for _ in range(20):
                assert_same(by_kernels(*(case, other)[index % 2]), expected[index % 2])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_without_an_openmp_runtime_a_pool_of_threads_does_it(case, set_threads, monkeypatch):
    expected = by_kernels(*case)
    monkeypatch.setattr(parallel, "_openmp", lambda: None)
    set_threads(3)
    used = set()
    submit = parallel._threads().submit

    class Pool:
        def submit(self, *arguments):
            used.add("pool")
            return submit(*arguments)

    monkeypatch.setattr(parallel, "_threads", Pool)
    assert_same(by_kernels(*case), expected)
    assert used == {"pool"}


@pytest.mark.skipif(sys.platform != "linux", reason="the OpenMP runtime is shared on Linux only")
def test_on_linux_the_kernels_run_on_the_threads_of_torch():
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))
    assert parallel._openmp() is not None
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line}
    assert len(runtimes) == 1, runtimes


def _child(case, expected, queue):
    try:
        assert parallel.thread_count(100) == 1
        torch.set_num_threads(1)  # as a data loader does: torch's own operators hang without it
        assert_same(by_kernels(*case), expected)
        queue.put("right")
    except BaseException as error:
        queue.put(repr(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_works_on(case, set_threads):
    """As a data loader's worker: forked after its parent has started OpenMP's threads."""
    set_threads(2)
    expected = by_kernels(*case)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(case, expected, queue))
    child.start()
    try:
        assert queue.get(timeout=120) == "right"
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert_same(by_kernels(*case), expected)


def test_no_more_threads_than_tasks_or_than_torch_may_use(set_threads):
    set_threads(3)
    assert [parallel.thread_count(tasks) for tasks in (1, 2, 3, 100)] == [1, 2, 3, 3]


def trivial_kernel(fingerprint):
    def kernel(job):
        fingerprint  # noqa: B018

    return kernel


def test_a_place_without_a_cache_compiles_each_time(monkeypatch):
    asked = []

    def cfunc(signature, **options):
        asked.append(options.get("cache", False))
        if asked[-1]:
            raise RuntimeError("cannot cache function 'kernel': no locator available for file 'x'")
        return lambda kernel: (signature, kernel)

    monkeypatch.setattr(jobs, "cfunc", cfunc)
    signature, kernel = jobs._compiled.__wrapped__(trivial_kernel)
    assert asked == [True, False]
    assert signature == types.void(types.int64)
    assert kernel(0) is None


def test_other_errors_of_the_compiler_are_not_taken_for_a_missing_cache(monkeypatch):
    def cfunc(signature, **options):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(jobs, "cfunc", cfunc)
    with pytest.raises(RuntimeError, match="out of registers"):
        jobs._compiled.__wrapped__(trivial_kernel)


SCRIPT = """
import torch
from v2m.ops.cpu import jobs, scan_forward
from v2m.ops.cpu.forward import forward_kernel
u = torch.ones(1, 1, 4, 3)
y = scan_forward(u, u, -torch.ones(3, 2), None, None, None, None, None, True, 2, False, None)
print(float(y.sum()), jobs._compiled(forward_kernel)._cache_hits)
"""


@pytest.mark.slow
def test_processes_that_start_together_share_one_cache(tmp_path):
    """Three at once on an empty cache, then one that finds it filled."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env=environment, stdout=subprocess.PIPE, text=True
        )

    outputs = [process.communicate()[0].split() for process in [start() for _ in range(3)]]
    late = start().communicate()[0].split()
    assert len({output[0] for output in [*outputs, late]}) == 1
    assert late[1] == "1"
    assert list(Path(tmp_path).rglob("*.nbc"))


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names an x86 machine")
def test_machines_without_avx512(tmp_path):
    """The other code for the exponentials and the shorter vectors, on a machine that has both."""
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    script = (
        f"from v2m.ops.cpu import vector; assert vector.LANES == 8\nimport pytest, sys\n"
        f"sys.exit(pytest.main(['-q', {str(Path(__file__).with_name('test_cpu.py'))!r}]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
    assert "no tests ran" not in result.stdout
