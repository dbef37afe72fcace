"""Processes on GPUs, by stand-ins: streams that run by chance, and threads in the simulator."""

import ctypes
import dataclasses
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import needs_simulator, resolved
from recorder import Noted, recording
from test_ranks import BAGS, DATA, WAIT, Made, Thread, compare

import robe.backend
from robe import train
from robe.backend import BackendError, agreed, among
from robe.feed import Streams
from robe.kernels.operations import version
from robe.kernels.parts import launch
from robe.model import build
from robe.nccl import CardsError, Nccl
from robe.ranks import ALONE, Mpi
from robe.timeline import no_phase

ID = (7,) * 128
TYPES = {"NCCL_UINT8": "uint8", "NCCL_FLOAT32": "float32", "NCCL_FLOAT64": "float64"}


class Communicator:
    """As NCCL's of CuPy: each call is queued on its stream, `meet(call, array)` to be done by all ranks."""

    def __init__(self, meet):
        self.meet = meet

    def allReduce(self, sent, received, count, held, operation, stream):
        self.reduce(sent, received, count, held, operation, None, stream)

    def reduce(self, sent, received, count, held, operation, root, stream):
        assert (received, operation) == (sent, "sum")
        self._queue(("sum", count, held, root), sent, stream)

    def bcast(self, address, count, held, root, stream):
        self._queue(("send", count, held, root), address, stream)

    def _queue(self, call, address, stream):
        _, count, held, _ = call
        assert count > 0
        memory = (ctypes.c_char * (count * np.dtype(held).itemsize)).from_address(address)
        self.meet(stream, call, np.frombuffer(memory, held))


def exchanged(call, arrays):
    """Do the call with the arrays of all ranks, but leave rubbish where it gives nothing."""
    what, _, _, root = call
    found = sum(arrays) if what == "sum" else arrays[root].copy()
    for rank, array in enumerate(arrays):
        array[...] = found if what == "send" or root in (None, rank) else 99


def nccl(meet):
    """As the module cupy.cuda.nccl, of one rank."""

    def connected(size, unique, rank):
        assert unique == ID
        return Communicator(meet)

    nothing = lambda: None  # noqa: E731
    calls = {"get_unique_id": lambda: ID, "groupStart": nothing, "groupEnd": nothing}
    return SimpleNamespace(NcclCommunicator=connected, NCCL_SUM="sum", **calls, **TYPES)


# Streams that run what is queued at random, in any order that is legal.


class Stream:
    def __init__(self, streams):
        self.queue, self.ptr = [], self
        streams.append(self)

    def add(self, action, ready=lambda: True, call=None):
        self.queue.append((ready, action, call))

    def wait_event(self, event):
        number = event.recorded
        self.add(lambda: None, lambda: event.done >= number)


class Event:
    recorded = done = 0

    def record(self, stream):
        self.recorded += 1
        number = self.recorded
        stream.add(lambda: setattr(self, "done", number))


class Late(np.ndarray):
    """An array of a card, which its stream `compute` writes to when it comes to that."""

    def __array_finalize__(self, of):
        self.compute = getattr(of, "compute", None)

    def __setitem__(self, index, value):
        self.compute.add(lambda: np.copyto(self.view(np.ndarray)[index], value))

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


def program(ranks, compute, empty):
    """What a rank asks for, and the copies that it sees of what came."""
    seen = []

    def see(*arrays):
        compute.add(lambda: seen.append([array.tolist() for array in arrays]))

    number = ranks.rank + 1
    begun, added, whole = empty(5, "float32"), empty(2, "float64"), empty(7, "float32")
    begun[...] = number
    ranks.begin(begun)
    added[...] = 10 * number
    ranks.add(added)
    see(added)
    for turn in (1, 2):
        whole[...] = number * turn
        parts = np.array_split(whole, ranks.size)
        ranks.reduced(parts)
        see(parts[ranks.rank])
        ranks.spread(parts)
        see(whole)
        rows, numbers = empty((ranks.rank, 2), "float32"), empty((ranks.rank,), "uint64")
        rows[...], numbers[...] = number * turn, number
        see(*ranks.joined(rows, numbers))
    ranks.finish(no_phase)
    see(begun)
    begun[...] = 0
    return seen


@pytest.mark.parametrize("seed", range(20))
def test_streams_of_cards_wait_for_one_another(seed):
    """In whatever order they run what is queued, each reads what it should, and none waits for ever."""
    size, streams, chance = 3, [], random.Random(seed)
    devices = [Streams(None, None, Event, Stream(streams), Stream(streams)) for _ in range(size)]

    def meet(stream, call, array):
        """All ranks come to the same call at last, and the last one does it."""
        others = [device.copies for device in devices]

        def ready():
            return all(other.queue and other.queue[0][2] == call for other in others)

        def action():
            heads = [array if other is stream else other.queue.pop(0)[1].array for other in others]
            exchanged(call, heads)

        action.array = array
        stream.add(action, ready, call)

    found = []
    for rank, device in enumerate(devices):

        def empty(shape, dtype, device=device):
            array = np.full(shape, 88, dtype).view(Late)
            array.compute = device.compute
            return array

        comm = SimpleNamespace(
            rank=rank,
            size=size,
            bcast=lambda value: ID,
            Allgather=lambda sent, received: np.copyto(received, range(size)),  # the rows of each
        )
        ranks = Nccl(comm, nccl(meet), Late, dataclasses.replace(device, empty=empty))
        found.append(program(ranks, device.compute, empty))
        moved = 2 * (5 * 4 + 2 * 8) + 2 * (7 * 4 + 7 * 4 + 3 * (2 * 4 + 8))
        assert ranks.moved == pytest.approx(moved * 2 / 3)
    while any(stream.queue for stream in streams):
        able = [stream for stream in streams if stream.queue and stream.queue[0][0]()]
        assert able, "each waits for another"
        chance.choice(able).queue.pop(0)[1]()
    for rank, seen in enumerate(found):
        turns = [
            each
            for turn in (1, 2)
            for each in (
                [[6.0 * turn] * (3, 2, 2)[rank]],
                [[6.0 * turn] * 7],
                [[[2.0 * turn] * 2] + [[3.0 * turn] * 2] * 2, [2, 3, 3]],
            )
        ]
        assert seen == [[[60.0] * 2], *turns, [[6.0] * 5]]


# Threads in the simulator: all is computed at once, but NCCL's calls are done when somebody waits for them.


class Latest:
    """A stream whose work is done as late as it may be."""

    def __init__(self):
        self.queue, self.ptr = [], self

    def wait_event(self, event):
        stream, count = event.recorded
        while count > stream.past:
            stream.past += 1
            stream.queue.pop(0)()

    past = 0


class Mark:
    def record(self, stream):
        self.recorded = stream, stream.past + len(stream.queue)


def on_cards(size, backend, work):
    """What `work(backend)` returns on each of so many ranks, whose arrays on the device travel by NCCL; and
    how many arrays went by MPI, each."""
    given, barrier = [None] * size, threading.Barrier(size, timeout=WAIT)

    class Counted(Thread):
        sent = 0

        def Sendrecv(self, *arguments):
            self.sent += 1
            super().Sendrecv(*arguments)

    def one(rank):
        comm = Counted(rank, given, barrier)

        def meet(stream, call, array):
            def action():
                calls, arrays = zip(*comm._all((call, array)), strict=True)
                assert set(calls) == {call}
                if rank == 0:
                    exchanged(call, arrays)
                comm._all(None)

            stream.queue.append(action)

        streams = Streams(backend.empty, None, Mark, Latest(), Latest())
        connect = lambda ranks: Nccl(ranks.comm, nccl(meet), Noted, streams)  # noqa: E731
        try:
            return work(among(dataclasses.replace(backend, connect=connect), Mpi(comm))), comm.sent
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(zip(*pool.map(one, range(size)), strict=True))


@pytest.fixture
def simulated(monkeypatch):
    """A backend whose arrays are told from those of the host, as CuPy and kernels on a device tell them.

    Ranks that are threads take turns, as they share the simulator and the scratch of kernels.
    """
    _, backend = recording(monkeypatch)
    lock, start, ufunc = threading.RLock(), launch.start, Noted.__array_ufunc__

    def there(arrays):
        assert all(isinstance(array, Noted) for array in arrays if isinstance(array, np.ndarray))

    def started(kernel, shape, arguments):
        there(part for a in arguments for part in (a if type(a) is tuple else (a,)))
        start(kernel, shape, arguments)

    def computed(self, function, method, *inputs, out=None, **options):
        there((*inputs, *(out or ())))
        return ufunc(self, function, method, *inputs, **({"out": out} if out else {}), **options)

    def locked(operation, name):
        kernel = version(operation, name)

        def call(*arguments):
            with lock:
                kernel(*arguments)

        return call

    monkeypatch.setattr(launch, "start", started)
    monkeypatch.setattr(Noted, "__array_ufunc__", computed)
    monkeypatch.setattr(robe.backend, "version", locked)
    monkeypatch.setattr(train, "EVALUATION_BATCH", 4)
    return backend


CASES = {
    "rows, sgd": ({"block": 4, "weights": 600}, "sgd", DATA, {"rows": 3}),
    "rows, adagrad": ({"method": "full"}, "adagrad", DATA, {"rows": 3}),
    "array, sgd": ({"block": 4, "weights": 44}, "sgd", DATA, {"array": 2, "rows": 1}),
    "array, adagrad": ({"block": 4, "weights": 44}, "adagrad", DATA, {"array": 2, "rows": 1}),
    "look-ups": ({"method": "mixed_precision", "cache": 0.2}, "adagrad", DATA, {"look-ups": 3}),
    "bags": ({"block": 4, "weights": 600}, "adagrad", BAGS, {"rows": 3}),
}


@needs_simulator
@pytest.mark.kernels
@pytest.mark.parametrize("case", CASES)
def test_cards_give_the_model_of_one(case, simulated, tmp_path):
    """Of 14 rows in batches of 6 the last has 2, fewer than 3 ranks."""
    embedding, optimizer, data, ways = CASES[case]
    optimizer, model = {"lr": 0.05, "optimizer": optimizer}, {"width": 4, "bottom": (5,), "top": (6,)}
    config = resolved(model, embedding, optimizer, batch=6, eval_every=2, backend="cuda")
    rows = {name: Made(n, data) for name, n in (("train", 14), ("validation", 9), ("test", 6))}

    def trained(backend, run):
        network = build(config, data, backend)
        summary = train.train(network, config, data, rows, run)
        return {name: np.array(array) for name, array in network.state().items()}, summary

    expected, alone = trained(simulated, tmp_path / "alone")
    for size in (2, 3):
        run = tmp_path / str(size)
        found, sent = on_cards(size, simulated, lambda backend, run=run: trained(backend, run))
        compare(found[0][0], expected)
        for arrays, summary in found:
            for name, array in found[0][0].items():
                assert arrays[name].tobytes() == array.tobytes(), name
            assert summary["test"] == found[0][1]["test"]
        assert found[0][1]["processes"]["ways"] == ways
        assert found[0][1]["test"]["auc"] == pytest.approx(alone["test"]["auc"], abs=0.01)
        # By MPI the sums of losses and rows of a log, and the logits of an evaluation, in two trips each.
        logs, evaluations = 3, 3
        assert set(sent) == {2 * (size - 1) * (2 * logs + evaluations)}


@needs_simulator
@pytest.mark.kernels
def test_cards_add_up_in_a_fixed_order_what_came_from_all(simulated):
    """Without, each would add up floats in an order of its own."""
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robe.backend, "version", lambda operation, name: taken.append((operation, name)))
        (backend, _), _ = on_cards(2, simulated, lambda backend: backend)
    assert ("scatter_add", "cuda_deterministic") in taken
    assert (backend.graph, backend.fuses_scatter) == (None, False)
    assert backend.description == "cuda (simulator, NumPy arrays), 2 processes"


COMM_TYPE_SHARED = "of one machine"  # by its module, as mpi4py has it


class Asked(Thread):
    """With what is used of a communicator before there is a task, and machines."""

    def __init__(self, rank, given, barrier, mail, beside):
        super().__init__(rank, given, barrier)
        self.mail, self.beside = mail, beside

    allgather = Thread._all

    def send(self, word, rank):
        self.mail[rank].append(word)

    def iprobe(self, source):
        return bool(self.mail[self.rank])

    def recv(self, source):
        return self.mail[self.rank].pop(0)

    def Split_type(self, kind):
        assert kind == COMM_TYPE_SHARED
        given, barrier, ranks = self.beside
        return Asked(ranks.index(self.rank), given, barrier, None, None)


NONE = "no CUDA device or driver was found"
BOTH = ["a", "b"]


@pytest.mark.parametrize(
    ("machines", "used", "refused"),
    [
        ([[BOTH, BOTH]], ["a", "b"], None),
        ([[["a"], ["b"]]], ["a", "b"], None),  # as Slurm shows them
        ([[BOTH, BOTH], [BOTH]], ["a", "b", "a"], None),
        ([[BOTH], [None]], ["a", None], f"process 1 of 2: {NONE}"),
        ([[BOTH, BOTH, BOTH]], ["a", "b", None], "process 2 of 3: 3 processes on a machine see 2 GPUs"),
    ],
    ids=["all see all", "each sees one", "two machines", "no GPU", "too many"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_takes_a_card_or_none_does(name, machines, used, refused, monkeypatch):
    here, size = threading.local(), len(used)
    seen = [cards for machine in machines for cards in machine]
    found, mail = [None] * size, [[] for _ in range(size)]

    class Device:
        def __init__(self, number):
            self.card = here.cards[number]

        def use(self):
            found[here.rank] = self.card

    runtime = SimpleNamespace(
        getDeviceCount=lambda: len(here.cards), deviceGetPCIBusId=lambda number: here.cards[number]
    )
    cuda = SimpleNamespace(Device=Device, runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setattr(robe.backend, "simulator", lambda: False)
    monkeypatch.setattr(robe.backend, "cuda_trouble", lambda: None if here.cards else NONE)
    beside, first = [], 0
    for machine in machines:
        ranks = range(first, first + len(machine))
        shared = [None] * len(ranks), threading.Barrier(len(ranks), timeout=WAIT), ranks
        beside += [shared] * len(ranks)
        first = ranks.stop
    given, barrier = [None] * size, threading.Barrier(size, timeout=WAIT)

    def one(rank):
        here.rank, here.cards = rank, seen[rank]
        ranks = Mpi(Asked(rank, given, barrier, mail, beside[rank]))
        if rank > 0:
            return ranks.follow()
        try:
            return agreed(name, ranks)
        finally:
            ranks.lead("a task")

    with ThreadPoolExecutor(size) as pool:
        leads, *others = [pool.submit(one, rank) for rank in range(size)]
        assert [other.result() for other in others] == [("a task",)] * (size - 1)
        if refused and name == "cuda":
            with pytest.raises(BackendError, match=refused):
                leads.result()
        else:
            assert leads.result() == ("cpu" if refused else "cuda")
    assert found == used


def test_what_needs_no_card_asks_for_none(monkeypatch):
    monkeypatch.setattr(robe.backend, "simulator", lambda: False)
    several = SimpleNamespace(size=2)
    assert [agreed(name, several) for name in ("cpu", "reference")] == ["cpu", "reference"]
    assert agreed("auto", ALONE) == "auto"


def test_nccl_that_is_missing_or_does_not_connect_costs_a_line(monkeypatch):
    absent = SimpleNamespace(nccl=SimpleNamespace(available=False))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=absent))
    monkeypatch.setitem(sys.modules, "cupy.cuda", absent)
    with pytest.raises(BackendError, match=r"GPUs need NCCL, which CuPy does not find: pip install .*cuda13"):
        robe.backend._connected(None, None)

    def connected(size, unique, rank):
        raise KeyError(6)

    comm = SimpleNamespace(rank=0, size=2, bcast=lambda value: value)
    module = SimpleNamespace(get_unique_id=lambda: ID, NcclCommunicator=connected)
    ranks = Nccl(comm, module, np.ndarray, None)
    with pytest.raises(CardsError, match=r"^NCCL cannot connect the GPUs of 2 processes \(KeyError: 6\); N"):
        ranks.add(np.ones(1))
