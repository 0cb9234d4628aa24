"""`mindformers serve`: loads a model, opens a port, answers until it is told to end."""
from __future__ import annotations

import argparse
import contextlib
import os
from dataclasses import replace
from functools import partial

from mindformers_ixc import terminal
from mindformers_ixc.checkpoint.weights_mark import weights_mark
from mindformers_ixc.cli.early_serve import api_key, limits_of
from mindformers_ixc.cli.inference import load_assistant
from mindformers_ixc.cli.serve_rank import ServingRank
from mindformers_ixc.data.paths import check_root
from mindformers_ixc.device import is_parallel, on_ascend
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.fields import MODE_ADAPTERS
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.batching import BatchDecoder
from mindformers_ixc.generation.extending import unavailable
from mindformers_ixc.generation.slots import cache_bytes
from mindformers_ixc.resources import model_name
from mindformers_ixc.serving.app import make_app
from mindformers_ixc.serving.decoders import gauges, make_decoder
from mindformers_ixc.serving.guard import Guard
from mindformers_ixc.serving.limits import PIECES, Limits, is_loopback
from mindformers_ixc.serving.listening import listen
from mindformers_ixc.serving.ranks import Leading, meeting
from mindformers_ixc.serving.request_log import RequestLog
from mindformers_ixc.serving.scheduling import RowDecoder, Scheduler
from mindformers_ixc.serving.server import HttpServer
from mindformers_ixc.serving.service import Service
from mindformers_ixc.serving.settings import ServerSettings
from mindformers_ixc.serving.signals import current as signals

# Part of the machine's memory that keys and values may take unless `--max_running` says otherwise.
CACHE_SHARE = 4


def serve(arguments: argparse.Namespace) -> int:
    """Serves a model until SIGTERM or Ctrl-C.

    Returns:
        Exit code.

    Raises:
        ConfigError: when the port cannot be had.
    """
    folder = meeting()
    rank = None if folder is None else ServingRank(folder)
    with terminal.current.doing(f"Loading {arguments.model}"):
        assistant = load_assistant(arguments, dict if rank is None else partial(rank.join, arguments.device_target))
    settings = settings_of(arguments, assistant)
    decoder = make_decoder(assistant, settings.limits.running, settings.limits.positions, arguments.piece)
    if rank is not None:
        if not rank.leads:
            rank.follow(decoder)
            return 0
        decoder = rank.lead(decoder)
    if arguments.max_stall is not None and isinstance(decoder, BatchDecoder):
        choose_piece(decoder, arguments.max_stall)
    warm_up(decoder, settings, arguments.warm_up)
    with contextlib.ExitStack() as stack:
        listening = listen(arguments.host, arguments.port)
        stack.callback(listening.close)
        service = make_service(assistant, decoder, settings)
        log = arguments.answers
        if arguments.log:
            log = stack.enter_context(open(arguments.log, "a", encoding="utf-8"))
        app = Guard(make_app(service), settings, arguments.host, tuple(arguments.allow_host), RequestLog(log),
                    service.metrics.responded, service.failed)
        server = HttpServer(app, service, settings.limits, arguments.drain_seconds, terminal.current.say)
        signals.end = server.end
        port = listening.getsockname()[1]
        server.run(listening, lambda: _ready(arguments, settings, port, rank))
    terminal.current.say("The server has ended.")
    if not service.worker.is_alive:
        if isinstance(decoder, Leading):
            decoder.end()
        return 0
    os._exit(0)     # a graph that still runs cannot be stopped, and the interpreter would wait for it


def make_service(assistant: Assistant, decoder: RowDecoder, settings: ServerSettings) -> Service:
    """What answers requests, in front of a decoder."""
    assert assistant.processor is not None, "a model directory has a processor"
    scheduler: Scheduler = Scheduler(decoder, settings.limits.queue, settings.limits.queue_each)
    service = Service(assistant.processor, scheduler, settings, _failed)
    service.metrics.more = lambda: gauges(decoder)
    return service


def settings_of(arguments: argparse.Namespace, assistant: Assistant) -> ServerSettings:
    """What the command line says, fitted to the model and to this machine's memory."""
    limits = limits_of(arguments)
    ranks = assistant.model.config.task_lora_ranks
    modes = tuple(mode for mode, tasks in MODE_ADAPTERS.items() if all(task in ranks for task in tasks))
    limits = _fitted(limits, assistant, said=arguments.max_running is not None)
    name, root = arguments.name or model_name(arguments.model), check_root(arguments.image_root)
    return ServerSettings(name, modes, limits, api_key(arguments), root, tuple(arguments.fetch_images),
                          tuple(arguments.allow_origin), arguments.allow_control_tokens, arguments.log_contents,
                          not arguments.no_ui, weights_mark(arguments.model))


def _fitted(limits: Limits, assistant: Assistant, said: bool) -> Limits:
    """Limits that the model and this machine's memory allow."""
    config = assistant.model.config
    positions = min(limits.positions, assistant.longest)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    running = limits.running
    counted = not unavailable() or (is_parallel() and not on_ascend())      # whose memory is this machine's
    while counted and cache_bytes(config, running + 1, positions) > memory // CACHE_SHARE and running > 1:
        if said:
            needed = cache_bytes(config, running + 1, positions)
            raise ConfigError(f"--max_running {running} and --max_positions {positions} need {needed / 2**30:.1f} GiB "
                              f"for keys and values, more than a fourth of this machine's memory "
                              f"({memory / 2**30:.1f} GiB). Lower one of them.")
        running //= 2
    if running < limits.running:
        terminal.current.say(f"{running} answers are written at once: keys and values of {limits.running} with "
                             f"{positions} positions would take more than a fourth of this machine's memory. "
                             "--max_positions lowers what each takes.")
    return replace(limits, positions=positions, running=running, new_tokens=min(limits.new_tokens, positions))


def choose_piece(decoder: BatchDecoder, seconds: float) -> None:
    """Makes the pieces of prompts as large as running answers may wait for, and says so where none is small enough."""
    with terminal.current.doing("Measuring a piece of a prompt"):
        taken = decoder.choose_piece(PIECES, seconds)
    if taken > seconds:
        terminal.current.say(f"A part of a piece of {decoder.piece} positions, the smallest there is, takes "
                             f"{taken:.2g} s on this machine, longer than --max_stall {seconds:g}; running answers "
                             "wait for it.")


def warm_up(decoder: RowDecoder, settings: ServerSettings, modes: str) -> None:
    """Compiles what requests need: of mode base, or of all."""
    if not isinstance(decoder, (BatchDecoder, Leading)):
        return
    for mode in settings.modes if modes == "all" else settings.modes[:1]:
        with terminal.current.doing(f"Compiling for mode {mode}"):
            decoder.warm_up(mode)


def _failed(error: BaseException) -> None:
    """An error that nobody foresaw: a sentence for the terminal, the traceback for the log folder."""
    import logging  # noqa: PLC0415 - of this function only

    logging.getLogger(__name__).error("A request failed.", exc_info=error)


def _ready(arguments: argparse.Namespace, settings: ServerSettings, port: int, rank: ServingRank | None) -> None:
    if rank is not None:
        rank.ready()
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    terminal.current.say(f"{settings.name} answers at http://{host}:{port}/v1 (modes {', '.join(settings.modes)}; "
                         f"{settings.limits.running} at once, {settings.limits.positions} positions each). Ctrl-C "
                         "ends it.")
    if not is_loopback(arguments.host) and not settings.api_key:
        terminal.current.say(f"WARNING: everybody who reaches {host}:{port} can ask, for there is no key; "
                             "--api_key KEY or MINDFORMERS_IXC_API_KEY sets one.")
