"""A pool of actors that replaces actors that die and repeats their work units.

    driver ── submit(key, method, args) ──> queue ──> idle actor      one call in flight per actor
           <──────── wait_any([pools]) ──── value | the unit is queued again, the actor replaced

Idle actors keep their CPUs and GPUs for the next unit.  They end only when another pool could not
start a single actor for a minute, and start again when they are needed.

Actor classes are plain and become remote here.  Every call must be safe to repeat, because a unit
whose actor died is tried again, up to `max_attempts` times in all.  An exception of the actor's
code is not repeated: it is raised in the driver at once, with its own type.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions

from system.errors import ClusterError

_DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,  # Ray kills actors on a node that runs out of memory
)

PATIENCE_SECONDS = 60.0
"""How long a pool waits for its first actor before idle actors of other pools are ended."""


@dataclass(frozen=True, slots=True)
class Done:
    """A finished work unit with its value."""

    pool: ActorPool
    key: Hashable
    value: Any


@dataclass(slots=True)
class _Unit:
    key: Hashable
    method: str
    args: tuple[Any, ...]
    attempts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorSpec:
    """How the actors of a pool are created."""

    name: str
    actor_class: type
    args: tuple[Any, ...] = ()
    num_actors: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    env: dict[str, str] = field(default_factory=dict)
    max_attempts: int = 3
    """Largest number of attempts at one unit, and of actors in a row that die while they start."""


class _Host:
    """Wraps the actor's object, so that an error in its constructor keeps its type."""

    def __init__(self, actor_class: type, args: tuple[Any, ...]) -> None:
        self._error: Exception | None = None
        try:
            self._actor = actor_class(*args)
        except Exception as error:  # raised again, unchanged, by the first call
            self._error = error

    def ready(self) -> None:
        """Returns as soon as the actor has started."""

    def call(self, method: str, *args: Any) -> Any:
        if self._error is not None:
            raise self._error
        return getattr(self._actor, method)(*args)


class ActorPool:
    """Actors of one kind, each with at most one call in flight.

    Args:
        spec: how its actors are created.
        neighbours: all pools that share the cluster; may contain this one.
        say: writes a log line for the user.
    """

    def __init__(
        self,
        spec: ActorSpec,
        neighbours: Mapping[str, ActorPool] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.spec = spec
        self._neighbours: Mapping[str, ActorPool] = {} if neighbours is None else neighbours
        self._say = say
        self._has_reported_wait = False
        threads = str(max(1, int(spec.num_cpus)))
        # Ray's tools show the name of the class, which should be that of the actor.
        host = type(spec.actor_class.__name__, (_Host,), {})
        self._remote_class = ray.remote(
            num_cpus=spec.num_cpus,
            num_gpus=spec.num_gpus,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, **spec.env}},
        )(host)
        self._idle: list[Any] = []
        self._num_actors = 0
        self._starting: dict[ray.ObjectRef, Any] = {}
        self._failed_starts = 0
        self._queue: deque[_Unit] = deque()
        self._in_flight: dict[ray.ObjectRef, tuple[_Unit, Any]] = {}

    @property
    def num_pending(self) -> int:
        """Number of units that are queued or in flight."""
        return len(self._queue) + len(self._in_flight)

    @property
    def has_room(self) -> bool:
        """Whether a unit submitted now would start at once."""
        return self.num_pending < self.spec.num_actors

    def submit(self, key: Hashable, method: str, *args: Any) -> None:
        """Queues one call of an actor's method."""
        self._queue.append(_Unit(key, method, args))
        self._start_queued()

    def map(
        self, units: Mapping[Hashable, Sequence[Any]], method: str
    ) -> Iterator[tuple[Hashable, Any]]:
        """Calls the method for every unit; yields (key, value) as they finish, in any order."""
        # Units are submitted only when an actor is free, so their arguments do not fill the store.
        waiting = deque(units.items())
        while waiting or self.num_pending:
            while waiting and self.has_room:
                key, args = waiting.popleft()
                self.submit(key, method, *args)
            for done in wait_any([self]):
                yield done.key, done.value

    def close(self) -> None:
        """Ends all actors and frees their resources; drops all units."""
        busy = [actor for _, actor in self._in_flight.values()]
        for actor in [*self._idle, *self._starting.values(), *busy]:
            ray.kill(actor)
        self._idle.clear()
        self._starting.clear()
        self._in_flight.clear()
        self._queue.clear()
        self._num_actors = self._failed_starts = 0

    def _end_idle(self) -> int:
        """Ends idle actors, and starting ones if no unit waits for them; returns their number."""
        ended, self._idle = self._idle, []
        if not self._queue:
            ended += self._starting.values()
            self._starting.clear()
        for actor in ended:
            ray.kill(actor)
        self._num_actors -= len(ended)
        return len(ended)

    def _seek_room(self) -> None:
        """Ends the idle actors of other pools if no actor of this one could start yet."""
        if not self._queue or self._in_flight or self._idle:
            return
        others = [pool for pool in self._neighbours.values() if pool is not self]
        num_ended = sum(pool._end_idle() for pool in others)
        if not self._has_reported_wait:
            self._has_reported_wait = True
            freed = (
                f"{num_ended} idle actors of other kinds were ended to make room"
                if num_ended
                else ""
            )
            self._say(
                f"  no {self.spec.name} has started after {PATIENCE_SECONDS:.0f} s: one needs "
                f"{self.spec.num_cpus:g} CPUs and {self.spec.num_gpus:g} GPUs, and may have to "
                f"load a model; {freed or 'it waits until the cluster has room'}"
            )

    def _start_queued(self) -> None:
        while self._queue and self._idle:
            actor = self._idle.pop()
            unit = self._queue.popleft()
            unit.attempts += 1
            reference = actor.call.remote(unit.method, *unit.args)
            self._in_flight[reference] = (unit, actor)
        # A unit is given to an actor only when it has started: an actor that finds no room on the
        # cluster would otherwise hold the unit back from those that are free.
        room = self.spec.num_actors - self._num_actors
        for _ in range(min(len(self._queue) - len(self._starting), room)):
            actor = self._remote_class.remote(self.spec.actor_class, self.spec.args)
            self._num_actors += 1
            self._starting[actor.ready.remote()] = actor

    def _references(self) -> list[ray.ObjectRef]:
        """References to wait for: units in flight and, while units are queued, starting actors."""
        return [*self._in_flight, *(self._starting if self._queue else ())]

    def _collect(self, reference: ray.ObjectRef) -> list[Done]:
        if reference in self._starting:
            self._finish_start(reference)
            return []
        unit, actor = self._in_flight.pop(reference)
        try:
            value = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            self._idle.append(actor)
            raise _cause(error) from error
        except (*_DEATHS, ray.exceptions.ObjectLostError) as error:
            self._replace(unit, actor, error)
            return []
        self._idle.append(actor)
        self._start_queued()
        return [Done(self, unit.key, value)]

    def _finish_start(self, reference: ray.ObjectRef) -> None:
        actor = self._starting.pop(reference)
        try:
            ray.get(reference)
        except _DEATHS as error:
            self._failed_starts += 1
            self._remove(actor, error)
            if self._failed_starts >= self.spec.max_attempts:
                raise ClusterError(
                    f"expected an actor of the {self.spec.name} pool to start, but "
                    f"{self._failed_starts} of them in a row died while they started: {error}"
                ) from error
        else:
            self._failed_starts = 0
            self._idle.append(actor)
        self._start_queued()

    def _remove(self, actor: Any, error: Exception) -> None:
        ray.kill(actor)
        self._num_actors -= 1
        if getattr(error, "actor_init_failed", False):
            raise ClusterError(
                f"an actor of the {self.spec.name} pool cannot start on its node. The usual cause "
                "is that the node lacks this package or has another version of it; install this "
                f"version on all nodes. Ray's message: {error}"
            ) from error

    def _replace(self, unit: _Unit, actor: Any, error: Exception) -> None:
        self._remove(actor, error)
        if unit.attempts >= self.spec.max_attempts:
            raise ClusterError(
                f"{self.spec.name} {unit.key}: expected a result, but its actor died "
                f"{unit.attempts} times in a row ({type(error).__name__}). The usual cause is "
                "memory: see the log of the node, lower the actor's batch size or raise its "
                "memory. Finished work units are kept; run the same command again to continue."
            ) from error
        self._queue.appendleft(unit)
        self._start_queued()


def wait_any(pools: Sequence[ActorPool], timeout_seconds: float | None = None) -> list[Done]:
    """Waits until at least one unit of any pool is finished; empty if none is pending."""
    while True:
        owners = {reference: pool for pool in pools for reference in pool._references()}
        if not owners:
            return []
        patience = PATIENCE_SECONDS if timeout_seconds is None else timeout_seconds
        ready, _ = ray.wait(list(owners), num_returns=1, timeout=patience)
        if not ready and timeout_seconds is None:
            for pool in pools:
                pool._seek_room()
        done = [item for reference in ready for item in owners[reference]._collect(reference)]
        if done or (timeout_seconds is not None and not ready):
            return done


def _cause(error: ray.exceptions.RayTaskError) -> BaseException:
    """The exception that the actor's code raised, under its own type."""
    cause = error.cause
    return cause if isinstance(cause, BaseException) else error
