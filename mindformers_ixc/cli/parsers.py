"""The words of the `mindformers` command: every subcommand with its options, help and examples."""
from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mindformers_ixc.cli.arguments import Help, Parser, Usual, WithoutFiles, add_loudness, add_no_verify, add_writing
from mindformers_ixc.cli.asking_options import add_generation, add_image_options
from mindformers_ixc.cli.benchmark_options import add_benchmark
from mindformers_ixc.cli.family_parsers import add_assemble, add_best_of, add_score
from mindformers_ixc.cli.preference_parsers import add_label, add_sample
from mindformers_ixc.cli.serve_options import add_serve_options
from mindformers_ixc.fields import ALL_MODES, MODE_ADAPTERS, TASK_LORAS
from mindformers_ixc.parameters import PARTS
from mindformers_ixc.scores import SCORES
from mindformers_ixc.version import __version__

if TYPE_CHECKING:
    # what `add_subparsers` gives; argparse has no public name for it
    Commands = argparse._SubParsersAction[Parser]


def build_parser() -> Parser:
    """The parser of the whole command."""
    parser = Parser(
        prog="mindformers", formatter_class=Help,
        description="Train InternLM-XComposer-2.5 with MindFormers and talk to it.",
        epilog="example:\n  mindformers run --config yaml_configs/ixc25_sft_tiny.yaml --output_dir out")
    parser.add_argument("--version", action="version", version=f"mindformers_ixc {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for add in (_add_run, _add_launch, _add_chat, _add_eval, _add_serve, add_score, add_sample, add_label, _add_convert,
                _add_quantize, _add_merge, add_assemble, _add_inspect, _add_data, _add_reference, _add_report,
                _add_plan, _add_recipes, _add_doctor, _add_init):
        add(commands)
    for command in commands.choices.values():
        add_loudness(command)
    return parser


def _add_init(commands: Commands) -> None:
    init = commands.add_parser(
        "init", formatter_class=Help, help="a YAML file for your own data, from a few answers",
        description="Asks for data, model and device (or takes them as options, and their defaults where there is no "
                    "terminal), checks the data, writes a commented YAML file and prints what to type next. Little "
                    "data begins with the starter, a small trained model that ships with the package.",
        epilog="examples:\n  mindformers init\n  mindformers init --data my_pictures --output my.yaml\n"
               "  mindformers init --data data.txt --model internlm-xcomposer2d5-7b --device Ascend --devices 8 "
               "--memory 64GB")
    init.add_argument("--data", metavar="PATH", help="a folder with pictures and a CSV table (columns image, question, "
                      "answer), or a .csv, .json, .jsonl or .txt file")
    init.add_argument("--model", metavar="DIR", help="model directory to begin with (default: starter, the shipped "
                      "one)")
    init.add_argument("--device", metavar="NAME", help="CPU, GPU or Ascend (default: CPU; Ascend for the 7B model)")
    init.add_argument("--devices", metavar="N", help="of the 7B model: 8, 16 or 64 (default: 8)")
    init.add_argument("--memory", metavar="SIZE", help="of a device that is no CPU (default: 64GB)")
    init.add_argument("--output", metavar="FILE", help="YAML file to write (default: my.yaml); the run goes to the "
                      "folder of its name without the ending")
    init.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")


def _add_run(commands: Commands) -> None:
    run = commands.add_parser(
        "run", formatter_class=Help, help="train, finetune or predict from a YAML file",
        description="Runs MindFormers' Trainer from a YAML file. Any key of the file can be overridden: "
                    "--runner_config.epochs 3.",
        epilog="examples:\n  mindformers run --config yaml_configs/ixc25_sft_tiny.yaml --output_dir out\n"
               "  mindformers run --config my.yaml --run_mode finetune --load_checkpoint out/model "
               "--lr_schedule.learning_rate 1e-4")
    run.add_argument("--config", required=True, metavar="FILE", help="YAML file of the run, or the name of a recipe")
    run.add_argument("--run_mode", choices=["train", "finetune", "predict"],
                     help="what to do (default: the file's run_mode)")
    run.add_argument("--register_path", metavar="DIR", help="folder of further modules for `auto_register`")
    run.add_argument("--output_dir", metavar="DIR", help="where everything the run writes goes (default: "
                     "the file's, else output)")
    run.add_argument("--load_checkpoint", metavar="PATH", help="weights to start from: a model directory or file, or "
                     "starter, the small trained model of this package (default: the file's)")
    run.add_argument("--overwrite", action="store_true",
                     help="move an earlier run's files in the output folder to old-N there, instead of refusing it")
    run.add_argument("--no_join", action="store_true",
                     help="of a parallel run leave what each rank has saved, without a whole model in OUTPUT_DIR/model")
    run.add_argument("--use_parallel", metavar="BOOL", help="run under msrun with the file's parallel_config "
                     "(default: the file's)")
    run.add_argument("--predict_data", metavar="FILE", help="questions for run_mode predict, one JSON object a "
                     "line (default: the file's input_data)")
    add_no_verify(run)


def _add_launch(commands: Commands) -> None:
    launch = commands.add_parser(
        "launch", formatter_class=Help, help="a parallel run or a server over several devices, one process a device",
        description="Starts `mindformers run --use_parallel True` once a device by MindSpore's msrun. Everything that "
                    "is not listed here goes to `run`. Ranks log into one folder, the log of the rank that reports the "
                    "loss is shown; when a rank dies all are ended, and the reason is the last line. With `serve` and "
                    "its options behind the launcher's, one server over the devices is started in place of a run.",
        epilog="examples:\n  mindformers launch -n 8 --config my.yaml --output_dir out\n"
               "  mindformers launch -n 16 --local_devices 8 --node_rank 1 --master_addr 10.0.0.1 --config ...\n"
               "  mindformers launch -n 2 serve --model out/model")
    launch.add_argument("-n", "--devices", type=int, required=True, metavar="N", help="devices, over all servers")
    launch.add_argument("--local_devices", type=int, metavar="N", help="of this server (default: all)")
    launch.add_argument("--node_rank", type=int, default=0, metavar="N", help="number of this server")
    launch.add_argument("--master_addr", default="127.0.0.1", metavar="HOST", help="address of server 0")
    launch.add_argument("--master_port", type=int, metavar="N", help="its port (default: a free one, else 8118)")
    launch.add_argument("--log_dir", metavar="DIR", help="of the ranks' logs (default: OUTPUT_DIR/rank_logs; of "
                        "a server a folder of its port's in the user's cache)")


def _add_chat(commands: Commands) -> None:
    chat = commands.add_parser(
        "chat", formatter_class=Help, help="ask about pictures, once or interactively",
        description="Prints the answer, and nothing else, on standard output. Without a question it is interactive.",
        epilog="examples:\n  mindformers chat --model out/model --image photo.jpg \"What is shown?\"\n"
               "  mindformers chat --model out/model\n  mindformers chat --server http://127.0.0.1:8000")
    add_generation(chat, or_server=True)
    chat.add_argument("--server", metavar="URL", help="ask a server (`mindformers serve`) in place of a model "
                      "directory, such as http://127.0.0.1:8000; its key stands in MINDFORMERS_IXC_API_KEY")
    chat.add_argument("--image", action="append", default=[], metavar="FILE",
                      help="a picture, or a video (by its suffix); may be repeated")
    chat.add_argument("--meta_instruction", default="", metavar="TEXT", help="system turn (default: none)")
    chat.add_argument("--do_sample", action="store_true", help="sample instead of taking the likeliest token")
    chat.add_argument("--temperature", type=float, default=1.0, metavar="X", help="of sampling")
    chat.add_argument("--top_p", type=float, default=0.8, metavar="X", help="of sampling")
    chat.add_argument("--num_beams", type=int, default=1, metavar="N", help="beam search over N beams")
    chat.add_argument("--repetition_penalty", type=float, default=1.0, metavar="X", help="1 is none")
    chat.add_argument("--seed", type=int, metavar="N", help="of sampling")
    add_best_of(chat)
    chat.add_argument("question", nargs="?", help="the question; left out: an interactive session")


def _add_serve(commands: Commands) -> None:
    serve = commands.add_parser(
        "serve", formatter_class=Help, help="answer over HTTP, as OpenAI's chat interface has it",
        description="Loads a model, compiles what requests need, opens a port and answers many at once until SIGTERM "
                    "or Ctrl-C (extra `serve`). Standard output has the log of requests, without their contents.",
        epilog="examples:\n  mindformers serve --model out/model\n  MINDFORMERS_IXC_API_KEY=$(openssl rand -hex 24) "
               "mindformers serve --model DIR --host 0.0.0.0")
    add_serve_options(serve)
    add_image_options(serve)
    add_no_verify(serve)


def _add_data_reading(command: argparse.ArgumentParser) -> None:
    command.add_argument("--image_folder", metavar="DIR", help="where relative picture paths start (default: "
                         "the data file's folder, then the working directory)")
    command.add_argument("--image_root", metavar="DIR", help="refuse pictures outside this folder, links followed")
    command.add_argument("--ignore_keys", nargs="+", default=[], metavar="KEY", help="keys of samples to leave unread")


def _add_eval(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "eval", formatter_class=Help, help="exact match and other scores over a conversation file; public benchmarks",
        description="Answers every question of a conversation file and scores the answers against the file's. Standard "
                    "output has one line a score; by default it is the exact match. With --benchmark the questions are "
                    "a public benchmark's, asked and scored as the paper's were, beside the paper's scores.",
        epilog="examples:\n  mindformers eval --model out/model --data train.json --shuffle_images\n"
               "  mindformers eval --model out/model --data charts.json --predictions answers.jsonl "
               "--metrics relaxed_accuracy anls exact_match --worst 5\n"
               "  mindformers eval --model internlm-xcomposer2d5-7b --benchmark ChartQA_TEST --data ChartQA_TEST.tsv\n"
               "  mindformers eval --server http://127.0.0.1:8000 --benchmark MMStar --data MMStar.tsv")
    add_generation(evaluate, or_server=True)
    evaluate.set_defaults(max_new_tokens=Usual(64))
    evaluate.add_argument("--data", required=True, metavar="FILE", help="conversations, as for training; of "
                          "--benchmark VLMEvalKit's table (.tsv)")
    _add_data_reading(evaluate)
    evaluate.add_argument("--batch_size", type=int, default=4, metavar="N", help="questions answered at once")
    evaluate.add_argument("--shuffle_images", action="store_true",
                          help="give every question another sample's picture: a model that looks must get worse")
    evaluate.add_argument("--predictions", metavar="FILE", help="write question, answer and expectation as they come, "
                          "a JSON object a line; what is there already, of the same model, data and settings, is not "
                          "asked again")
    evaluate.add_argument("--metrics", nargs="+", choices=list(SCORES), default=["exact_match"], metavar="NAME",
                          help=f"scores, in the order in which they are printed: {', '.join(SCORES)} (default: "
                          "exact_match)")
    evaluate.add_argument("--ignore_case", action="store_true", help="let exact match ignore the case of letters (the "
                          "other scores always do)")
    evaluate.add_argument("--worst", type=_count, default=3, metavar="N", help="show the N worst answers on standard "
                          "error (default: 3)")
    add_benchmark(evaluate)


def _count(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="checkpoint: a public directory (safetensors or .bin), one file, "
                        "MindSpore's, or a run's rank folders")
    parser.add_argument("target", metavar="DST", help="directory to be made, or a .safetensors or .ckpt file")
    parser.add_argument("--to", choices=["ms", "hf"], help="MindSpore's layout, or the public one (default: "
                        "the other one, of `merge` the same)")
    add_writing(parser)


def _add_convert(commands: Commands) -> None:
    convert = commands.add_parser(
        "convert", formatter_class=Help, help="public checkpoints to MindSpore and back, cut for N devices and joined",
        description="Converts a checkpoint, a few rows of one tensor in memory at a time. Killed at any moment it "
                    "leaves nothing that looks whole, and the same command goes on.",
        epilog="examples:\n  mindformers convert internlm-xcomposer2d5-7b ixc25_ms\n"
               "  mindformers convert internlm-xcomposer2d5-7b ixc25_tp8 --tp 8 --dtype bfloat16\n"
               "  mindformers convert out trained --to hf")
    _add_target(convert)
    convert.add_argument("--format", choices=["safetensors", "ckpt"], default="safetensors",
                         help="container of --to ms")
    convert.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel: devices of a pipeline stage")
    convert.add_argument("--pp", type=int, default=1, metavar="M", help="pipeline stages")
    convert.add_argument("--mode", choices=list(ALL_MODES), default="all",
                         help="task LoRAs in the graph the layout is for; the others stay whole in every rank")
    convert.add_argument("--check_layout", action="store_true", help="compile the graph without devices as well, and "
                         "refuse if MindSpore's compiler cuts anything otherwise (needs g++)")
    convert.add_argument("--drop", nargs="+", default=[], metavar="TASK",
                         help=f"task LoRAs to leave out: {', '.join(TASK_LORAS)}")
    convert.add_argument("--strategy", metavar="PATH", help="strategy file or folder of SRC's ranks, if it is not in "
                         "the usual place")


def _add_quantize(commands: Commands) -> None:
    quantize = commands.add_parser(
        "quantize", formatter_class=Help, help="weights of 4 or 8 bits, for answers on a CPU",
        description="Rounds the linears of the decoder to 4 bits (a scale and a zero for 128 weights) or 8 (a scale "
                    "for an output); embedding, head, low-rank pairs, tower and projector become 8 bits. Chat and eval "
                    "compute with them as they lie in the file. Killed at any moment it leaves nothing that looks "
                    "whole, and the same command goes on. A model in AWQ's layout is packed anew, number by number the "
                    "same. `mindformers convert DST FULL --to hf` makes full weights again.",
        epilog="examples:\n  mindformers quantize internlm-xcomposer2d5-7b ixc25_4bit\n"
               "  mindformers quantize out/model out/model_4bit --calibrate my_data/train.json\n"
               "  mindformers quantize out/model out/model_8bit --bits 8\n"
               "  mindformers quantize internlm-xcomposer2d5-7b ixc25_awq --layout awq")
    quantize.add_argument("source", metavar="SRC", help="checkpoint with full weights, as convert reads it, or one in "
                          "AWQ's layout")
    quantize.add_argument("target", metavar="DST", help="directory to be made")
    quantize.add_argument("--bits", type=int, choices=[4, 8], default=4, help="of the decoder's linears")
    quantize.add_argument("--layout", choices=["mindformers_ixc", "awq"], default="mindformers_ixc",
                          help="this package's, which is mapped as it is, or AWQ's of 4 bits, which other tools read; "
                          "there everything but the decoder's linears is float16")
    quantize.add_argument("--calibrate", metavar="FILE", help="conversations with pictures, in any form that training "
                          "reads: 4-bit weights are chosen by what their outputs lose on them, layer by layer, "
                          "of AWQ, GPTQ and both (default: every weight is rounded to the nearest)")
    quantize.add_argument("--samples", type=int, metavar="N", help="of the calibration at most, spread over FILE "
                          "(default: 16)")
    add_writing(quantize, dtype=False)


def _add_merge(commands: Commands) -> None:
    merge = commands.add_parser(
        "merge", formatter_class=Help, help="fold LoRAs into weights, extract and attach parts, average checkpoints",
        description="Changes weights in float32, rounded once. The steps asked for are done in this order: average, "
                    "attach, lora, fold, extract.",
        epilog="examples:\n  mindformers merge ixc25 ixc25_web --fold web\n"
               "  mindformers merge ixc25 merged --lora my_peft_adapter\n"
               "  mindformers merge trained adapter --extract partial_lora separators\n"
               "  mindformers merge ixc25 again --attach adapter\n"
               "  mindformers merge step_100 mean --average step_200 step_300")
    _add_target(merge)
    merge.add_argument("--average", nargs="+", default=[], metavar="SRC", help="take the mean with these, oldest first")
    merge.add_argument("--ema", type=float, metavar="DECAY", help="exponential average of SRC and --average instead")
    merge.add_argument("--attach", metavar="SRC", help="tensors that replace SRC's, as --extract made them")
    merge.add_argument("--lora", metavar="SRC", help="trained LoRA (PEFT or MindFormers) to fold in")
    merge.add_argument("--alpha", type=float, metavar="X", help="its alpha, if it has no adapter_config.json")
    merge.add_argument("--adapter", metavar="NAME", help="which adapter, if the LoRA's file holds several")
    merge.add_argument("--fold", nargs="+", default=[], metavar="TASK",
                       help=f"task LoRAs to fold in: {', '.join(TASK_LORAS)}")
    merge.add_argument("--extract", nargs="+", default=[], metavar="PART", help="keep these parts only: "
                       f"{', '.join(PARTS)}")


def _add_inspect(commands: Commands) -> None:
    inspect = commands.add_parser(
        "inspect", formatter_class=Help, help="what is in a checkpoint",
        description="Prints parts, parameter counts, formats, and what is missing or surplus.",
        epilog="examples:\n  mindformers inspect internlm-xcomposer2d5-7b\n"
               "  mindformers inspect ixc25_tp8 --verify --json")
    inspect.add_argument("source", metavar="SRC", help="any checkpoint")
    inspect.add_argument("--config", metavar="PATH", help="config.json to compare with (default: SRC's own)")
    inspect.add_argument("--strategy", metavar="PATH", help="strategy of rank folders, if it is not in the usual place")
    inspect.add_argument("--verify", action="store_true", help="compare every byte with its digest")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    inspect.add_argument("--json", action="store_true", help="JSON instead of text")


def _add_data(commands: Commands) -> None:
    data = commands.add_parser(
        "data", formatter_class=Help, help="published datasets to conversation files; which rows suit some data, "
        "and what samples look like",
        description="Converts a dataset as it is published to a conversation file and prints the number of samples. "
                    "`data plan DATA --config FILE` measures conversation files and says which seq_length and "
                    "max_tiles suit them when samples are packed. `data preview DATA` writes one HTML page of samples "
                    "as the model sees them: tiles, tokens with and without loss, counts, what is cut or refused; DATA "
                    "may be a folder with a table too. `data index DATA` builds the index that runs read by (else they "
                    "do it themselves), `data index --list` shows what is kept and `--clean` removes what is outdated; "
                    "`data check DATA` prints what is wrong with data, source by source. "
                    "Any key of FILE can be overridden, as with `run`.",
        epilog="examples:\n  mindformers data coco_captions captions_train2017.json coco.json --images train2017\n"
               "  mindformers data vqa_v2 v2_OpenEnded_mscoco_train2014_questions.json "
               "v2_mscoco_train2014_annotations.json vqa.json\n"
               "  mindformers data plan data.txt --config yaml_configs/ixc25_sft.yaml "
               "--train_dataset.tokenizer.vocab_file PUBLIC/tokenizer.model\n"
               "  mindformers data preview my_pictures --config my.yaml --output preview.html\n"
               "  mindformers data index data.txt --config my.yaml\n"
               "  mindformers data index --list\n"
               "  mindformers data index --clean\n"
               "  mindformers data check data.txt --config my.yaml --decode")
    data.add_argument("kind", metavar="KIND",
                      help="coco_captions, vqa_v2, text_vqa, ocr_vqa, share_gpt or llava; or plan, preview, index or "
                      "check")
    data.add_argument("files", nargs="+", metavar="FILE",
                      help="the published files, then the file to be written; of the others the data (--list and "
                      "--clean do without)")
    data.add_argument("--config", metavar="FILE", help="of plan, preview, index and check: YAML file of the run, "
                      "or the name of a recipe (default, but for plan: ixc25_own_tiny)")
    data.add_argument("--global_batch", type=int, metavar="N", help="of plan: samples of a step (default: the file's)")
    data.add_argument("--json", action="store_true", help="of plan: JSON instead of text")
    data.add_argument("--sample", type=int, nargs="+", metavar="N", help="of preview: numbers of the samples to show, "
                      "counted from 0; they are printed too")
    data.add_argument("--samples", type=int, metavar="K", help="of preview: how many to show, evenly over the data "
                      "(default: 12, at most 50)")
    data.add_argument("--output", metavar="FILE", help="of preview: page to write (default: preview.html); of check: "
                      "a page of samples as well; of index: folder of indices (default: in the user's cache)")
    data.add_argument("--list", action=WithoutFiles, help="of index: show what is kept of the data, or of all; with "
                      "--output or the index_dir of --config, in that folder")
    data.add_argument("--clean", action=WithoutFiles, help="of index: remove what is outdated and not in use")
    data.add_argument("--all", action="store_true", help="with --clean: remove what is current, too")
    data.add_argument("--decode", action="store_true", help="of check: read the pixels of all pictures too")
    data.add_argument("--bad", metavar="FILE", help="of check: every sample that cannot be used, as JSON lines")
    data.add_argument("--png", metavar="FILE", help="of check: histograms as a picture (extra `report`)")
    data.add_argument("--format", choices=["json", "jsonl"], help="of the file to be written: a JSON list, or JSON "
                      "lines (default: by its ending)")
    data.add_argument("--images", metavar="DIR", help="put in front of picture names")
    data.add_argument("--split", choices=["train", "validation", "test"], help="of ocr_vqa (default: train)")


def _add_reference(commands: Commands) -> None:
    reference = commands.add_parser(
        "reference", formatter_class=Help, help="log-probabilities of a reference model, for preference pairs",
        description="Writes a preference file again with `reference_logps` in every pair, so that a preference run "
                    "whose input_columns has that column need not compute its reference.",
        epilog="example:\n  mindformers reference pairs.json pairs_ref.json --model out_sft/model")
    reference.add_argument("pairs", metavar="FILE", help="preference pairs")
    reference.add_argument("target", metavar="TARGET", help="file to write")
    reference.add_argument("--model", required=True, metavar="DIR", help="model directory of the reference")
    reference.add_argument("--mode", choices=list(MODE_ADAPTERS), default="write", help="task LoRAs in use "
                           "(default: write)")
    _add_data_reading(reference)
    reference.add_argument("--hd_num", type=int, metavar="N", help="as in the run to come (default: the model "
                           "directory's, else 18)")
    reference.add_argument("--image_transform", choices=["training", "inference"], default="training",
                           help="as in the run to come (default: training)")
    add_image_options(reference)
    reference.add_argument("--batch_size", type=int, default=4, metavar="N", help="answers at once")
    reference.add_argument("--control_tokens", action="store_true", help="as in the run to come")
    reference.add_argument("--device_target", choices=["CPU", "GPU", "Ascend"], default="CPU", help="where to compute")
    add_no_verify(reference)


def _add_report(commands: Commands) -> None:
    draw = commands.add_parser(
        "report", formatter_class=Help, help="curves and answers of a run, or of several, as one HTML page",
        description="Writes OUTPUT/report.html, one file that needs nothing else: curves of loss, held-out loss, "
                    "learning rate, speed and more, sample answers with their pictures, settings and commands of a "
                    "run, finished or not; and the curves as OUTPUT/report/*.png. Several runs are compared on one "
                    "page.",
        epilog="examples:\n  mindformers report out\n  mindformers report first second third --page compared.html")
    draw.add_argument("outputs", nargs="+", metavar="OUTPUT", help="--output_dir of a run; several are compared")
    draw.add_argument("--page", metavar="FILE", help="the page to write (default: OUTPUT/report.html; of several runs "
                      "comparison.html in the working folder)")


def _add_plan(commands: Commands) -> None:
    plan = commands.add_parser(
        "plan", formatter_class=Help, help="memory, messages and cuts of a step on a cluster that need not be there",
        description="Compiles the step of one rank of each pipeline stage, without devices, and prints what a device "
                    "holds, what it sends, and how each parameter is cut. Any key of the file can be overridden, as "
                    "with `run`. The exit code is 1 when it does not fit.",
        epilog="examples:\n  mindformers plan --config yaml_configs/ixc25_sft.yaml --devices 8\n"
               "  mindformers plan --config my.yaml --devices 64 --model_parallel 8 --pipeline_stage 2\n"
               "  mindformers plan --config my.yaml --devices 64 --device_memory 32GB --search --no_compile")
    plan.add_argument("--config", required=True, metavar="FILE", help="YAML file of the run, or the name of a recipe")
    plan.add_argument("--devices", type=int, required=True, metavar="N", help="devices, over all servers")
    plan.add_argument("--device_memory", metavar="SIZE", help="of a device, such as 64GB (default: the file's "
                      "context.max_device_memory, else 64GB)")
    plan.add_argument("--data_parallel", type=int, metavar="N", help="replicas (default: the file's, or what the other "
                      "degrees leave)")
    plan.add_argument("--model_parallel", type=int, metavar="N", help="tensor-parallel devices of a stage "
                      "(default: the file's)")
    plan.add_argument("--pipeline_stage", type=int, metavar="N", help="pipeline stages (default: the file's)")
    plan.add_argument("--micro_batch_num", type=int, metavar="N", help="micro batches of a step; without a pipeline "
                      "they are accumulated (default: the file's)")
    plan.add_argument("--global_batch", type=int, metavar="N", help="samples (packed: rows) of a step "
                      "(default: the file's)")
    plan.add_argument("--data", metavar="DATA", help="samples that the rows are made of (as data_loader.dataset_dir): "
                      "goodput, useful samples a second, days")
    plan.add_argument("--mean_samples", type=float, metavar="X", help="samples of a packed row, instead of --data")
    plan.add_argument("--steps", type=int, metavar="N", help="of the run, for its days (default with --data: the "
                      "file's epochs)")
    plan.add_argument("--search", action="store_true", help="try every layout by formula, then compile the best")
    plan.add_argument("--top", type=int, default=10, metavar="N", help="layouts that --search shows (default: 10)")
    plan.add_argument("--no_compile", action="store_true", help="formulae only: takes no time, checks nothing")
    plan.add_argument("--every_layer", action="store_true", help="compile all layers, not three of a kind, which the "
                      "others are like: minutes and up to 8 GB a stage for 7B")
    plan.add_argument("--json", action="store_true", help="JSON instead of text")
    plan.add_argument("--html", metavar="FILE", help="write a page too: memory by stage, messages, when each stage "
                      "works, cuts")
    for name, text in (("tflops", "assumed peak of a device, 10^12 operations a second (default: the file's "
                        "device_tflops, else 320)"),
                       ("utilisation", "assumed share of it (default: 0.4)"),
                       ("server_bandwidth", "assumed within a server, 10^9 bytes a second a device (default: 150)"),
                       ("network_bandwidth", "assumed between servers, 10^9 bytes a second a device (default: 20)")):
        plan.add_argument(f"--{name}", type=float, metavar="X", help=text)
    plan.add_argument("--devices_per_server", type=int, metavar="N", help="assumed (default: 8)")


def _add_doctor(commands: Commands) -> None:
    doctor = commands.add_parser(
        "doctor", formatter_class=Help, help="is this machine in order? versions, devices, a self test",
        description="Looks at versions (against a table of pairs that are known to work), memory, cores, compilers, "
                    "folders, disks, Ascend's driver and CANN, and lets a tiny model train and answer. Each problem "
                    "comes with what to do. The exit code is 1 when something would stop a run.",
        epilog="examples:\n  mindformers doctor\n  mindformers doctor --quick --json\n"
               "  mindformers doctor --device_target Ascend")
    doctor.add_argument("--quick", action="store_true", help="leave out the self test and MindSpore's import: an "
                        "answer in under a second")
    doctor.add_argument("--device_target", choices=["CPU", "GPU", "Ascend"], default="CPU",
                        help="where runs are to compute; with Ascend a missing device is a problem (default: CPU)")
    doctor.add_argument("--json", action="store_true", help="JSON instead of text")


def _add_recipes(commands: Commands) -> None:
    recipes = commands.add_parser(
        "recipes", formatter_class=Help, help="the YAML files that ship with the package",
        description="Lists the recipes, or writes one down with everything that it says, comments included, to be "
                    "changed. Wherever a command takes --config FILE, the name of a recipe will do.",
        epilog="examples:\n  mindformers recipes\n  mindformers recipes copy ixc25_sft_tiny my.yaml\n"
               "  mindformers run --config ixc25_sft_tiny --output_dir out")
    recipes.add_argument("action", nargs="?", choices=["list", "copy"], help="list: show them, as without "
                         "a word; copy: write the recipe NAME to FILE")
    recipes.add_argument("name", nargs="?", metavar="NAME", help="of the recipe")
    recipes.add_argument("target", nargs="?", metavar="FILE", help="to be written, or a folder for it; what is there "
                         "stays (default: NAME.yaml)")
