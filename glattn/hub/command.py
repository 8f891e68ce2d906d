"""``glattn push``: a training's best weights to the Hub."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", help="run folder of a training, or a folder with model.safetensors and config.json")
    parser.add_argument("repo", help="where to: org/name on the Hub, made if it is not there")
    parser.add_argument(
        "--private", action="store_true", help="make a new repository private, and push to no public one"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to, made if it is not there")
    parser.add_argument("--message", default="Upload model", help="the commit's message (%(default)r)")
    parser.add_argument("--dry-run", metavar="FOLDER", help="write the files to this folder; nothing is sent")


def run(args: argparse.Namespace) -> int:
    """Push, and print where the model lies and how to load it."""
    from glattn.hub.publish import push

    where = push(
        args.run,
        args.repo,
        private=args.private,
        revision=args.revision,
        message=args.message,
        dry_run=args.dry_run,
    )
    print(where)
    name = f"{args.repo}@{args.revision}" if args.revision else args.repo
    source = f"local-dir:{where}" if args.dry_run else f"hf-hub:{name}"
    print(f'timm.create_model("{source}", pretrained=True)')
    return 0
