"""How do I spread work over workers that come and go, without giving any of them more than it can do?

A job queue: workers dial in, and each job goes on a stream of its own to a worker that has a free slot.

    python job_queue.py

The script is the queue, and starts three workers as processes. A worker accepts no more streams than it has slots. The
queue always has one more stream open to it, and a stream that is accepted (`wait_established`) is a free slot: the next
job goes there. So jobs wait in the queue and not at a busy worker; and the queue is bounded, so whoever adds jobs waits.

One worker is killed in the middle of a job. Its streams break at once, and the job runs elsewhere. A worker that hangs
would be found by a timeout. A job that fails three times is given up: it may be the one that kills them.
"""

import functools
import json
import os
import signal
import sys

import gevent
import gevent.server
from gevent import subprocess
from gevent.event import AsyncResult
from gevent.queue import Queue

import geyamux
from geyamux.server import StreamServer

SLOTS = {"ann": 2, "bob": 1, "eve": 2}
JOBS = 20
WAITING_JOBS = 3
JOB_TIMEOUT = 30
TRIES = 3


class Job:
    def __init__(self, number):
        self.number, self.tries, self.result = number, 0, AsyncResult()


class JobQueue:
    def __init__(self):
        self.waiting = Queue(WAITING_JOBS)
        self.free_slots = Queue()  # streams that workers have accepted

    def submit(self, number):
        """Add a job; return the AsyncResult that will have what comes out. Waits while the queue is full."""
        job = Job(number)
        self.waiting.put(job)
        return job.result

    def serve(self, conn, address):
        """A worker, from its connection to its end."""
        with geyamux.Server(conn) as session:
            try:
                with session.accept(timeout=10) as hello:
                    name = hello.read(100).decode()
                while True:
                    stream = session.open()
                    stream.wait_established()
                    self.free_slots.put((stream, name))
            except (geyamux.SessionError, geyamux.StreamError, TimeoutError):
                pass  # whoever waits for an answer from it hears of it too

    def dispatch(self):
        for job in self.waiting:
            stream, name = self.free_slots.get()
            while stream.ready():  # without having been asked: its end has come, the worker is gone
                stream, name = self.free_slots.get()
            gevent.spawn(self.run, job, stream, name)

    def run(self, job, stream, name):
        job.tries += 1
        try:
            with stream:
                stream.settimeout(JOB_TIMEOUT)
                stream.sendall(json.dumps(job.number).encode() + b"\n")
                job.result.set(json.loads(stream.readline()))
        except (geyamux.SessionError, geyamux.StreamError, TimeoutError, ValueError) as error:
            print(f"{name} has failed with job {job.number}")
            if job.tries == TRIES:
                job.result.set_exception(error)
            else:
                self.waiting.put(job)


def work(name, stream, address):
    if line := stream.readline():
        number = json.loads(line)
        if name == "bob":
            os.kill(os.getpid(), signal.SIGKILL)
        gevent.sleep(0.1)
        stream.sendall(json.dumps({"square": number * number, "worker": name}).encode() + b"\n")


def worker(port, name):
    # A stream may wait for a slot as long as jobs take.
    config = geyamux.Config(accept_timeout=None)
    with geyamux.connect(("127.0.0.1", port), timeout=10, config=config) as session:
        with session.open() as hello:
            hello.sendall(name.encode())
        StreamServer(session, functools.partial(work, name), spawn=SLOTS[name]).serve_forever()


def demo():
    queue = JobQueue()
    gevent.spawn(queue.dispatch)
    with gevent.server.StreamServer(("127.0.0.1", 0), queue.serve) as server:
        server.start()
        command = [sys.executable, __file__, "worker", str(server.server_port)]
        workers = [subprocess.Popen([*command, name]) for name in SLOTS]
        while queue.free_slots.qsize() < sum(SLOTS.values()):
            gevent.sleep(0.01)
        results = [queue.submit(number) for number in range(JOBS)]
        done = sum(result.ready() for result in results)
        print(f"{done} of {JOBS} jobs were done when the queue had room for the last")
        answers = [result.get(timeout=20) for result in results]
        print("all results are right:", [answer["square"] for answer in answers] == [n * n for n in range(JOBS)])
        print("they come from", *sorted({answer["worker"] for answer in answers}))
        for process in workers:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(int(sys.argv[2]), sys.argv[3])
    else:
        demo()
