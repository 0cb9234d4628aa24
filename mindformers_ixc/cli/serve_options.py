"""The words of `mindformers serve`."""
from __future__ import annotations

import argparse
from dataclasses import fields

from mindformers_ixc.serving.limits import MEANINGS, PIECES, Limits


def add_serve_options(serve: argparse.ArgumentParser) -> None:
    """Adds the options of a server."""
    serve.add_argument("--model", required=True, metavar="DIR", help="model directory, such as OUT/model, or starter, "
                       "the small one of this package")
    serve.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen at (default: "
                       "127.0.0.1, this machine alone; 0.0.0.0: every network it is in)")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="port (default: 8000; 0: a free one)")
    serve.add_argument("--name", metavar="NAME", help="of the model (default: that of its folder or run)")
    serve.add_argument("--no_ui", "--no-ui", action="store_true", help="no page at /")
    serve.add_argument("--log", metavar="FILE", help="of requests, a JSON object a line (default: standard output)")
    serve.add_argument("--log_contents", action="store_true", help="questions and answers stand in that log too")
    serve.add_argument("--drain_seconds", type=float, default=60.0, metavar="S", help="that running answers have to "
                       "end after SIGTERM (default: 60)")
    trust = serve.add_argument_group("who may ask, and what requests may name")
    trust.add_argument("--api_key", metavar="KEY", help="that clients must send (default: the variable "
                       "MINDFORMERS_IXC_API_KEY, which unlike the command line other users cannot read; else none)")
    trust.add_argument("--image_root", metavar="DIR", help="requests may name pictures in this folder, links followed")
    trust.add_argument("--fetch_images", nargs="+", default=[], metavar="HOST", help="hosts that requests may name "
                       "pictures of, by http(s); never private addresses")
    trust.add_argument("--allow_origin", nargs="+", default=[], metavar="ORIGIN", help="pages elsewhere that may ask "
                       "from a browser, such as https://example.org")
    trust.add_argument("--allow_host", nargs="+", default=[], metavar="NAME", help="further names by which a server on "
                       "127.0.0.1 is reached, through a proxy say")
    trust.add_argument("--allow_control_tokens", action="store_true", help="text that is spelled like <s> or "
                       "[UNUSED_TOKEN_145] becomes that control token; for clients that are trusted as much as the "
                       "server")
    speed = serve.add_argument_group("how it computes")
    speed.add_argument("--device_target", choices=["CPU", "GPU", "Ascend"], default="CPU", help="where to compute")
    speed.add_argument("--piece", type=int, choices=PIECES, default=PIECES[0], help="positions of a prompt that are "
                       "computed at a time, half of the layers or fewer after one another: running answers wait for no "
                       f"more than such a part (default: {PIECES[0]})")
    speed.add_argument("--max_stall", type=float, metavar="S", help="seconds that running answers may wait for "
                       "somebody's prompt: the largest piece whose parts take no longer is chosen, in place of --piece")
    speed.add_argument("--warm_up", choices=["base", "all"], default="base", help="modes that are compiled before the "
                       "port opens (default: base; the others with their first request)")
    speed.add_argument("--reuse_bytes", type=int, metavar="BYTES", help="memory for what earlier requests computed of "
                       "pictures and prompts; 0: none (default: 1 GiB)")
    limits = serve.add_argument_group("limits")
    for one in fields(Limits):
        usual: float = getattr(Limits(), one.name)
        limits.add_argument(f"--max_{one.name}", type=type(usual), metavar="N",
                            help=f"{MEANINGS[one.name]} (default: {usual if usual > 1e5 else f'{usual:g}'})")
    serve.set_defaults(control_tokens=False)
