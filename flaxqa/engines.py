"""Who computes the shards of a batch run: this process, a pool of actors of Ray, several hosts.

No engine changes a byte of the parts.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flaxqa.config import PredictConfig
from flaxqa.errors import TryAgain, UsageError
from flaxqa.parts import Entry, Place
from flaxqa.progress import Progress
from flaxqa.work import Worker, load_reader

if TYPE_CHECKING:
    from flaxqa.reader import Reader


RETRIES = 3  # of a shard whose actor was lost
PATIENCE = 60.0  # seconds until it is said that no actor has started
log = logging.getLogger(__name__)


def run_here(
    config: PredictConfig, place: Place, reader: Reader, left: Sequence[int], progress: Progress
) -> Iterator[tuple[Entry, Mapping[str, int]]]:
    """The engine `local`: this process answers all."""
    from flaxqa.profile import Profile

    worker = Worker(config, place.plan, place.run_key, reader)
    with Profile(config.profile) as profile:
        for entry, spent in worker.run(left, place.write, profile.after(progress.advance)):
            yield entry, dataclasses.asdict(spent)


def for_ray(config: PredictConfig) -> PredictConfig:
    """The config with what actors would each decide by the devices that they see.

    This process only hands out work: it keeps its hands off accelerators, which are the actors'.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    if config.dtype != "auto":
        return config
    accelerated = config.worker_gpus > 0 or bool(config.worker_resources)
    return dataclasses.replace(config, dtype="bfloat16" if accelerated else "float32")


def run_on_ray(
    config: PredictConfig, place: Place, reader: Reader, left: Sequence[int], progress: Progress
) -> Iterator[tuple[Entry, Mapping[str, int]]]:
    """The engine `ray`: actors that take a shard at a time, whichever is free.

    The cluster is that of RAY_ADDRESS, or one that is started in this machine, on loopback.
    """
    if not left:
        return
    with ray_cluster() as ray:
        workers = min(config.workers or default_workers(config, ray), len(left))
        # A fraction of a CPU; JAX takes the cores that it finds in any case.
        cpus = 0.5 / workers if config.worker_cpus is None else config.worker_cpus
        # Lost actors are replaced, but not for ever where it is the shard that ends them.
        kind = ray.remote(
            num_cpus=cpus, num_gpus=config.worker_gpus, resources=dict(config.worker_resources),
            max_restarts=-1, max_task_retries=RETRIES,
        )(RayWorker)  # fmt: skip
        actors = [kind.remote(config, place) for _ in range(workers)]
        for entry, took in given_out(ray, actors, left):
            progress.advance(entry.rows + entry.set_aside, took["windows"])
            yield entry, took


def given_out(
    ray: Any, actors: Sequence[Any], shards: Sequence[int]
) -> Iterator[tuple[Entry, Mapping[str, int]]]:
    """What comes of the shards, each given to an actor that is there and free."""
    waiting, count = collections.deque(shards), 0
    running = {actor.ready.remote(): actor for actor in actors}
    started = False
    while count < len(shards):
        done, _ = ray.wait(list(running), timeout=None if started else PATIENCE)
        if not done:
            log.warning("no worker has started yet; the cluster has %s", ray.cluster_resources())
            continue
        actor, started = running.pop(done[0]), True
        if (result := ray.get(done[0])) is not None:
            count += 1
            yield result
        if waiting:
            running[actor.answer.remote(waiting.popleft())] = actor


@contextlib.contextmanager
def ray_cluster() -> Iterator[Any]:
    """The module `ray`, with a cluster; one that is started here ends with it.

    Raises:
      UsageError: Ray is not installed.
      TryAgain: it gave up.
    """
    if "RAY_ADDRESS" not in os.environ and "ray" not in sys.modules:
        # Ray reads it when it is imported. Only so does it listen on loopback alone on Linux, too:
        # it takes an address of 127.0.0.1 that it is given for the machine's address.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"--engine ray needs Ray: pip install 'flaxqa[ray]' ({error})") from error

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    started = not ray.is_initialized()
    if started:
        local: dict[str, Any] = {
            "include_dashboard": False,
            "object_store_memory": 128 << 20,  # what passes through it is small
        }
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if "RAY_ADDRESS" in os.environ else local),
        )
    try:
        yield ray
    except ray.exceptions.RayError as error:
        raise TryAgain(f"Ray gave up: {error}") from error
    finally:
        if started:
            ray.shutdown()


def default_workers(config: PredictConfig, ray: Any) -> int:
    """One for each GPU if workers take GPUs, otherwise one for each machine."""
    if config.worker_gpus:
        return max(1, int(ray.cluster_resources().get("GPU", 0) // config.worker_gpus))
    return sum(bool(node["Alive"]) for node in ray.nodes())


class RayWorker:
    """A `Worker` in an actor of Ray: shards in, what the manifest says of them out."""

    def __init__(self, config: PredictConfig, place: Place):
        self.place = place
        self.worker = Worker(config, place.plan, place.run_key, load_reader(config))

    def ready(self) -> None:
        """Returns once the model is loaded."""

    def answer(self, shard: int) -> tuple[Entry, dict[str, int]]:
        """One shard, written."""
        ((entry, spent),) = self.worker.run([shard], self.place.write)
        return entry, dataclasses.asdict(spent)


@contextlib.contextmanager
def multihost_share() -> Iterator[tuple[int, int]]:
    """This process's share of the work, by `jax.distributed`, which all processes have to enter.

    At the end each waits for the others once. Meanwhile they do not communicate.

    Raises:
      UsageError: there is nothing that tells who the others are.
      TryAgain: another process was lost; what this one finished is kept.
    """
    import jax
    from jax.experimental import multihost_utils

    variables = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    try:
        given: dict[str, Any] = {
            name: int(os.environ[variable])
            for name, variable in variables.items()
            if variable in os.environ
        }
        address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
        if address.startswith(("127.", "localhost:", "[::1]")):
            given["coordinator_bind_address"] = address  # or JAX would listen to everybody
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"--multihost: jax.distributed cannot start: {error}. On TPU pods, Slurm and Open MPI "
            "it finds the other processes by itself; elsewhere set JAX_COORDINATOR_ADDRESS, "
            f"{' and '.join(variables.values())}, or use --shard i/n"
        ) from error
    yield jax.process_index(), jax.process_count()
    try:
        multihost_utils.sync_global_devices("flaxqa: all parts are written")
    except jax.errors.JaxRuntimeError as error:
        raise TryAgain(f"another process was lost: {error}") from error
