"""SAM2UNeXT on Hugging Face's hub: from_pretrained, save_pretrained, push_to_hub."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch

from unext import checkpoint, files
from unext.download import PUBLISHED

CARD = Path(__file__).resolve().parent.parent / "docs/model_card.jinja"  # the template of a folder's README.md


class Hub:
    """Adds the methods of this file to the network. test.py accepts the folders that they write."""

    @classmethod
    def from_pretrained(
        cls, name: str | Path, hiera_path: str | Path | None = None, dinov2_path: str | Path | None = None,
        *, precision: torch.dtype = torch.float32, download: bool = False, **options: Any,
    ) -> "Hub":  # fmt: skip
        """`from_checkpoint` of a folder or of "user/model" on the hub, with options of `hf_hub_download`."""
        from huggingface_hub import hf_hub_download

        folder = Path(name)
        if not folder.is_dir():
            for file in (checkpoint.CONFIG, checkpoint.MODEL):
                folder = Path(hf_hub_download(name, file, **options)).parent
        return cls.from_checkpoint(folder, hiera_path, dinov2_path, precision=precision, download=download)

    def save_pretrained(self, save_directory: str | Path, *, model_card_kwargs: dict[str, Any] | None = None) -> None:
        """Writes a folder with header, tensors and, unless it has a README.md, a model card. Raises OSError.

        `model_card_kwargs` are variables of docs/model_card.jinja, such as `results`, the content of results.json.
        """
        from huggingface_hub import ModelCard, ModelCardData

        folder, content = files.output_folder(save_directory), checkpoint.network_content(self)
        state, records = content.pop("state_dict"), content["encoders"]
        content["encoders"] = {option: records[option] | {"path": ""} for option in records}  # publish no local paths
        with files.replacing(folder / checkpoint.MODEL) as file:
            file.write(safetensors.torch.save(state))
        files.write_json(folder / checkpoint.CONFIG, content)
        if not (folder / "README.md").exists():
            names = checkpoint.encoder_files(self.config).values() if records else ()
            variables = {"config": self.config, "encoders": {n: PUBLISHED.get(n) for n in names}}
            variables |= model_card_kwargs or {}
            data = ModelCardData(license="apache-2.0", pipeline_tag="image-segmentation", tags=["sam2", "dinov2"])
            ModelCard.from_template(data, template_path=CARD, **variables).save(folder / "README.md")

    def push_to_hub(
        self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, private: bool | None = None,
        token: str | None = None, **options: Any,
    ) -> str:  # fmt: skip
        """Uploads such a folder, with options of `HfApi.upload_folder`. Returns the commit's URL."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, model_card_kwargs={"repo_id": repo_id} | (model_card_kwargs or {}))
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)
