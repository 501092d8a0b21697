"""Routers telling each other through a real kvstore what they have promised."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from baton.rpc.reservations import Reserved, SharedReservations
from baton.rpc.v1 import kvstore_pb2, kvstore_pb2_grpc
from tests.integration.kvstore_processes import KvstoreProcess, until


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KvstoreProcess]:
    process = KvstoreProcess(tmp_path / "kvstore.log")
    yield process
    process.kill()


@asynccontextmanager
async def running(*routers: SharedReservations) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        started = [tasks.create_task(router.run()) for router in routers]
        yield
        for task in started:
            task.cancel()


async def test_each_router_sees_the_sum_of_the_others_until_they_leave(store: KvstoreProcess) -> None:
    await store.start()
    one, two, three = (SharedReservations(store.address, name) for name in ("one", "two", "three"))
    live: dict[str, tuple[int, int, int]] = {"w": (0, 0, 0)}
    async with running(one):
        one.publish({"w": (1, 100, 7), "v": (0, 0, 3)})
        async with running(two, three):
            two.publish(live)
            live["w"] = (2, 50, 5)  # read when it is sent
            await until(lambda: three.others() == {"w": (3, 150, 12), "v": (0, 0, 3)}, "three sees both")
            await until(lambda: two.others() == {"w": (1, 100, 7), "v": (0, 0, 3)}, "two sees one")
            await until(lambda: one.others() == {"w": Reserved(2, 50, 5)}, "one sees two")
            for count in range(500):
                live["w"] = (count, count, 0)
                two.publish(live)
            await until(lambda: one.others() == {"w": (499, 499, 0)}, "the latest arrives")
            live["w"] = (0, 0, 0)
            two.publish(live)
            await until(lambda: one.others() == {}, "nothing is left of it")
            live["w"] = (1, 1, 1)
            two.publish(live)
            await until(lambda: one.others(), "two has promised again")
        await until(lambda: one.others() == {}, "two's promises ended with it")


async def test_without_the_kvstore_nobody_is_heard_and_afterwards_everybody(store: KvstoreProcess) -> None:
    one, two = SharedReservations(store.address, "one"), SharedReservations(store.address, "two")
    async with running(one, two):
        one.publish({"w": (1, 1, 1)})
        await store.start()
        await until(lambda: two.others() == {"w": (1, 1, 1)}, "two hears one")
        store.kill()
        await until(lambda: two.others() == {}, "two hears nobody")
        one.publish({"w": (2, 2, 2)})
        await store.start()
        await until(lambda: two.others() == {"w": (2, 2, 2)}, "two hears one again")


async def test_a_stream_that_makes_no_sense_is_refused(store: KvstoreProcess) -> None:
    await store.start()
    message = kvstore_pb2.RouterReservations
    worker = kvstore_pb2.Reservation(worker_id="w", requests=1)
    bad = {
        "router_id": [[message()], [message(router_id="a"), message(router_id="b")]],
        "reservations": [[message(router_id="a", reservations=[worker] * 10_001)]],
    }
    async with grpc.aio.insecure_channel(store.address) as channel:
        for field, streams in bad.items():
            for stream in streams:
                call = kvstore_pb2_grpc.ReservationsStub(channel).Share()
                for one in stream:
                    await call.write(one)
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    async for _ in call:
                        pass
                assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert field in (error.value.details() or "")
