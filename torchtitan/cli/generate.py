"""Continue a prompt with a trained model; the text appears as it is made.

    torchtitan generate --checkpoint outputs/checkpoint/step-1000 --prompt "def main("
    torchrun --nproc_per_node 2 -m torchtitan generate --checkpoint Llama-3.1-8B/ --prompt "Once upon a time" --seed 1

The checkpoint is one of a run, or a folder of Hugging Face transformers (config.json, .safetensors, tokenizer.json).
Several processes share the model by tensor parallel. The text goes to stdout, all else to stderr.
"""

import argparse
import io
import sys
import time
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan.checkpoint import Ranks, check_divisible, find_pretrained
from torchtitan.components.generation import Sampling, TextStream, generate, get_num_new_tokens
from torchtitan.config.errors import ConfigError
from torchtitan.config.sections import Comm
from torchtitan.distributed.utils import get_world, init_distributed, leave_process_group
from torchtitan.protocols.model import Decoder
from torchtitan.tools.device import get_device_type


def parse_args(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--prompt", default="", help="text to continue (default: none)")
    parser.add_argument(
        "--max_new_tokens", type=int, help="tokens to make at most (default: 100, or what the context leaves)"
    )
    parser.add_argument("--temperature", type=float, default=Sampling.temperature, help="0 is greedy (%(default)s)")
    parser.add_argument(
        "--top_k", type=int, default=Sampling.top_k, help="draw from the K most probable tokens; 0: all (%(default)s)"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=Sampling.top_p,
        help="and from the fewest whose probabilities add up to P (%(default)s)",
    )
    parser.add_argument("--seed", type=int, help="repeats a text (default: another one at each start)")
    parser.add_argument("--custom_import", default="", help="module that the run's experimental.custom_import may name")
    parser.add_argument("--config", type=Path, help="config.toml of the run, where the checkpoint has none")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or its folder, where it is not the model's own")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=get_device_type(), help="(%(default)s)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of the weights (default: bfloat16 on a GPU, float32 on CPU)"
    )
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> None:
    check_device(args.device)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise ConfigError(f"seed={args.seed}: expected 0 or more, and less than 2**63")
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt is not UTF-8 after {args.prompt[: error.start]!r}; give it in UTF-8") from None
    pretrained = find_pretrained(
        args.checkpoint, config=args.config, tokenizer=args.tokenizer, custom_import=args.custom_import
    )
    tokenizer = pretrained.build_tokenizer()
    prompt = tokenizer.encode(args.prompt, add_bos=True, add_eos=False)
    if not prompt:
        raise ConfigError("the tokenizer has no token that begins a text; give a --prompt to continue")
    max_new_tokens = get_num_new_tokens(len(prompt), args.max_new_tokens, context=pretrained.args.max_seq_len)
    check_divisible(pretrained.args, get_world().size)
    dtype = getattr(torch, args.dtype or {"cuda": "bfloat16", "cpu": "float32"}[args.device])

    device, tp_mesh = start_processes(args.device)

    def load() -> Decoder:
        return pretrained.build_model(device=device, dtype=dtype, tp_mesh=tp_mesh)

    model = load() if tp_mesh is None else Ranks().together(load)
    generator = torch.Generator(device)
    seed = generator.seed() % 2**31 if args.seed is None else args.seed
    tokens = generate(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_ids=pretrained.eos_ids | ({tokenizer.eos_id} if tokenizer.eos_id is not None else set()),
        generator=generator.manual_seed(seed),
        tp_mesh=tp_mesh,
    )
    if get_world().rank != 0:
        for _ in tokens:
            pass
        return
    stream = TextStream(tokenizer.decode, prompt)
    show(args.prompt)
    begin = time.perf_counter()
    num_tokens = 0
    for token in tokens:
        num_tokens += 1
        show(stream.add(token))
    show(stream.end() + "\n")
    speed = num_tokens / (time.perf_counter() - begin)
    print(f"{num_tokens} tokens, {speed:.1f} tokens/s, seed {seed}", file=sys.stderr)


def check_device(device_type: str) -> None:
    num_processes, num_gpus = get_world().local_size, torch.cuda.device_count()
    if device_type == "cuda" and num_processes > num_gpus:
        raise ConfigError(f"{num_processes} processes on this machine need a GPU each, and it has {num_gpus}")


def start_processes(device_type: str) -> tuple[torch.device, DeviceMesh | None]:
    """This process's device, and the mesh of all processes if there are several."""
    world = get_world()
    if world.size == 1:
        return torch.device(device_type), None
    device = init_distributed(Comm(trace_buf_size=0), dump_folder="", device_type=device_type)
    return device, init_device_mesh(device_type, (world.size,), mesh_dim_names=("tp",))


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Write the text; the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 lacks some characters
    failed = True
    try:
        run(parse_args(parser, words))
        failed = False
    except ConfigError:
        if get_world().rank == 0:  # all ranks raise it
            raise
    finally:
        leave_process_group(failed=failed)
    return int(failed)
