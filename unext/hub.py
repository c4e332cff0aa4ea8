"""SAM2UNeXT on Hugging Face's hub: from_pretrained, save_pretrained, push_to_hub."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download

from unext import checkpoint, files
from unext.download import PUBLISHED

CARD = Path(__file__).resolve().parent.parent / "docs/model_card.jinja"  # the template of a folder's README.md


class Hub(
    ModelHubMixin, paper_url="https://arxiv.org/abs/2508.03566", license="apache-2.0",
    pipeline_tag="image-segmentation", tags=["sam2", "dinov2"],
):  # fmt: skip
    """`save_pretrained` and `push_to_hub` write a folder that is a checkpoint for test.py too; `from_pretrained` takes
    it or "user/model", and the options of `from_checkpoint`. `model_card_kwargs` may have `results`, the content of
    eval.py's results.json."""

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **options: Any) -> str:
        card = {"repo_id": repo_id} | (model_card_kwargs or {})
        return super().push_to_hub(repo_id, model_card_kwargs=card, **options)

    def generate_model_card(self, **options: Any) -> ModelCard:
        encoders = checkpoint.encoder_files(self.config).values() if checkpoint.is_small(self) else ()
        published = {name: PUBLISHED.get(name) for name in encoders}
        return super().generate_model_card(template_path=CARD, config=self.config, encoders=published, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        content = checkpoint.network_content(self, whole=not checkpoint.is_small(self))
        state = {key: tensor.contiguous() for key, tensor in content.pop("state_dict").items()}
        # The paths on this machine are nobody else's business.
        encoders = {option: record | {"path": ""} for option, record in content["encoders"].items()}
        with files.replacing(save_directory / checkpoint.MODEL) as file:
            file.write(safetensors.torch.save(state))
        with files.replacing(save_directory / checkpoint.CONFIG) as file:
            file.write(json.dumps(content | {"encoders": encoders}, indent=1).encode() + b"\n")

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, revision: str | None, cache_dir: str | Path | None, force_download: bool,
        local_files_only: bool, token: str | bool | None, **options: Any,
    ) -> "Hub":  # fmt: skip
        folder = Path(model_id)
        if not folder.is_dir():
            fetch = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download, "token": token}
            for name in (checkpoint.CONFIG, checkpoint.MODEL):
                path = hf_hub_download(model_id, name, local_files_only=local_files_only, **fetch)
            folder = Path(path).parent
        return cls.from_checkpoint(folder, **options)
