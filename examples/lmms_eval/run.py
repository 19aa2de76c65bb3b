"""lmms-eval's command line, with minifocus among its models: takes the arguments of `python -m lmms_eval`.

python examples/lmms_eval/run.py --model minifocus --model_args pretrained=FOLDER,sampler=focus --tasks pope
"""

from lmms_eval.cli.dispatch import main
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest

# This folder is on the path of modules, because the script that runs lies in it.
MODEL_REGISTRY_V2.register_manifest(ModelManifest("minifocus", simple_class_path="minifocus_lmms.Minifocus"))

if __name__ == "__main__":
    main()
