"""A process that talks gRPC can start others, whatever its connections do meanwhile."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import baton

import asyncio
from asyncio.subprocess import PIPE

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


async def main():
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

        async def talk():
            while True:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())

        talking = [asyncio.create_task(talk()) for _ in range(4)]
        for _ in range(150):
            process = await asyncio.create_subprocess_exec("true", stdin=PIPE, stdout=PIPE)
            print(await process.wait())
        for task in talking:
            task.cancel()
    await server.stop(0)


uvloop.run(main())
"""


def test_processes_start_beside_grpc() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["0"] * 150, ran.stderr
