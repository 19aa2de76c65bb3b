"""lmms-eval's command line, with minifocus among its models: takes the arguments of `python -m lmms_eval`.

python examples/lmms_eval/run.py --model minifocus --model_args pretrained=FOLDER,sampler=focus --tasks pope
"""

import sys
from pathlib import Path

# Not for longer: the folder has an evaluate.py, which is no package of that name.
sys.path.append(str(Path(__file__).resolve().parent.parent))
import command_line

sys.path.pop()
if __name__ == "__main__":
    command_line.begin()

from lmms_eval.cli.dispatch import main
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest

# This folder is on the path of modules, because the script that runs lies in it.
MODEL_REGISTRY_V2.register_manifest(ModelManifest("minifocus", simple_class_path="minifocus_lmms.Minifocus"))

if __name__ == "__main__":
    command_line.run(command_line.guarded(main))
