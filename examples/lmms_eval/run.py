"""lmms-eval's command line, with minifocus among its models: takes the arguments of `python -m lmms_eval`.

python -m examples.lmms_eval.run --model minifocus --model_args pretrained=FOLDER,sampler=focus --tasks pope
"""

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

from lmms_eval.cli.dispatch import main
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest

MODEL = "examples.lmms_eval.minifocus_lmms.Minifocus"
MODEL_REGISTRY_V2.register_manifest(ModelManifest("minifocus", simple_class_path=MODEL))

if __name__ == "__main__":
    command_line.run(command_line.guarded(main))
