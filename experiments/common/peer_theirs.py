"""The peer: the same step by torch, transformers and peft, eager or compiled."""

from __future__ import annotations

import json
import pathlib
import re
import types
import warnings
from typing import Any

import peft
import torch
import transformers

from experiments.common.peer_cases import ALPHA, BOTTLENECK, ENCODERS, PREFIX, RANK
from experiments.common.peer_memory import host_peak_mib
from experiments.common.peer_model import LABELS, batch_of
from experiments.common.peers import rate_of

# By kind: LoRA's targets, every linear layer, where adapters stand, and the norms.
PLACES: dict[str, tuple[list[str], list[str], str, str]] = {
    "bert": (
        ["query", "value"],
        ["query", "key", "value", "intermediate.dense", "output.dense"],
        r"\.layer\.\d+\.(attention\.)?output\.dense$",
        r"LayerNorm\.",
    ),
    "gpt2": (["c_attn"], ["c_attn", "c_proj", "c_fc"], r"\.c_proj$", r"\.ln_\w+\."),
    "llama": (
        ["q_proj", "v_proj"],
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        r"\.(o_proj|down_proj)$",
        r"norm\.weight$",
    ),
}


class Adapted(torch.nn.Module):
    """A projection with Houlsby's bottleneck after it, which starts near the identity.

    peft has no bottleneck adapters: this is what it does for LoRA, fp32 beside any base.
    """

    def __init__(self, base: torch.nn.Module, width: int, size: int) -> None:
        super().__init__()
        self.base = base
        about: dict[str, Any] = {"device": next(base.parameters()).device, "dtype": torch.float32}
        self.down = torch.nn.Linear(width, size, **about)
        self.up = torch.nn.Linear(size, width, **about)
        for layer in (self.down, self.up):
            torch.nn.init.trunc_normal_(layer.weight, std=1e-3, a=-2e-3, b=2e-3)
            torch.nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`h + up(gelu(down(h)))` with `h` the projection's output."""
        h = self.base(x)
        low = torch.nn.functional.gelu(self.down(h.to(self.down.weight.dtype)), approximate="tanh")
        return h + self.up(low).to(h.dtype)


def with_adapters(model: torch.nn.Module, places: str, norms: str, size: int) -> None:
    """Put adapters after the matched projections; they, the norms and the head are trained."""
    for name, p in model.named_parameters():
        p.requires_grad_(bool(re.search(norms, name)) or name.startswith("classifier."))
    found = [(n, m) for n, m in model.named_modules() if re.search(places, n)]
    for name, module in found:
        parent, _, last = name.rpartition(".")
        # torch's layers say out_features; GPT-2's, which are transposed, nf.
        width = getattr(module, "out_features", None) or getattr(module, "nf")  # noqa: B009
        setattr(model.get_submodule(parent), last, Adapted(module, width, size))


class Prefixed(torch.nn.Module):
    """A classifier whose encoder has peft's prefix, and whose head is trained.

    peft's own classifier does not take the encoders of newer versions of transformers.
    """

    def __init__(self, classifier: Any, about: peft.PrefixTuningConfig) -> None:
        super().__init__()
        self.encoder: Any = peft.get_peft_model(classifier.base_model, about)
        self.classifier = classifier.classifier

    def forward(self, labels: torch.Tensor, **inputs: torch.Tensor) -> Any:
        """The loss, as transformers' models give it."""
        out = self.encoder(**inputs)
        pooled = getattr(out, "pooler_output", None)
        logits = self.classifier(out.last_hidden_state if pooled is None else pooled)
        return types.SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits, labels))


class Theirs:
    """A model with a method, its optimiser and a batch.

    **Arguments:** `job`, a row of the comparison as JSON has it.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.gpu = job["device"] == "gpu"
        if self.gpu and not torch.cuda.is_available():
            raise RuntimeError("this torch has no CUDA: install one that has")
        if job["threads"]:
            torch.set_num_threads(job["threads"])
        if self.gpu:
            torch.cuda.init()
            # What JAX does with fp32 products on such a device.
            torch.set_float32_matmul_precision("high")
        self.device = torch.device("cuda" if self.gpu else "cpu")
        once = torch.ones(8, 8, device=self.device, requires_grad=True)
        torch.tanh(once @ once).sum().backward()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        warnings.filterwarnings("ignore")

    def load(self) -> None:
        """The model from its files, the method on it, and the optimiser."""
        job = self.job
        torch.manual_seed(0)
        base = self._base()
        kind = base.config.model_type
        self.encoder = kind in ENCODERS
        family = "bert" if self.encoder else kind if kind == "gpt2" else "llama"
        self.model: Any = self._with_method(base, *PLACES[family])
        if job["remat"]:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            if job["method"] != "full":
                # The embeddings are frozen: without it no gradient would reach the layers.
                self.model.enable_input_require_grads()
        self.model.train()
        self.batch = self._tensors(
            batch_of(kind, base.config.vocab_size, job["batch"], job["length"])
        )
        # transformers' Trainer has the fused one too.
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=True)
        self.forward = torch.compile(self.model) if job["compiled"] else self.model
        if job["generation"] is not None:
            rows, prompt = job["generation"]["rows"], job["generation"]["prompt"]
            made = batch_of(kind, base.config.vocab_size, rows, prompt)
            self.prompt = self._tensors({k: made[k] for k in ("input_ids", "attention_mask")})

    def _base(self) -> Any:
        job, folder = self.job, pathlib.Path(self.job["directory"])
        config = transformers.AutoConfig.from_pretrained(folder)
        # Dropout is off on both sides.
        for name in json.loads((folder / "config.json").read_text()):
            if re.search(r"drop(out)?(_prob)?$", name) and hasattr(config, name):
                setattr(config, name, 0.0)
        kind = config.model_type
        dtype = torch.float32 if job["precision"] == "fp32" else torch.bfloat16
        options: dict[str, Any] = {"config": config, "dtype": dtype}
        if kind in ENCODERS:
            config.num_labels = LABELS
        if job["method"] == "qlora":
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                # A name is looked for from the start, or at the end, of a module's whole path.
                llm_int8_skip_modules=["classifier", r".*pooler", "lm_head"],
            )
            options["device_map"] = {"": self.device}
        auto: Any = transformers.AutoModelForCausalLM
        if kind in ENCODERS:
            auto = transformers.AutoModelForSequenceClassification
        model = auto.from_pretrained(folder, **options)
        return model if job["method"] == "qlora" else model.to(self.device)

    def _with_method(
        self, base: Any, some: list[str], every: list[str], places: str, norms: str
    ) -> Any:
        method = self.job["method"]
        if method == "full":
            return base
        if method == "adapter":
            with_adapters(base, places, norms, BOTTLENECK)
            return base
        task = "SEQ_CLS" if self.encoder else "CAUSAL_LM"
        if method == "prefix":
            task = "FEATURE_EXTRACTION" if self.encoder else task
            about = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=PREFIX)
            model = Prefixed(base, about) if self.encoder else peft.get_peft_model(base, about)
            with torch.no_grad():
                prefixed: Any = model.encoder if isinstance(model, Prefixed) else model
                prefixed.prompt_encoder["default"].embedding.weight.zero_()
            return model
        targets = some if method == "lora" else every
        about = peft.LoraConfig(
            task_type=task,
            r=RANK,
            lora_alpha=int(ALPHA),
            lora_dropout=0.0,
            target_modules=targets,
            fan_in_fan_out=base.config.model_type == "gpt2" and method != "qlora",
        )
        if method == "qlora":
            # What peft's helper does too, but for casting all that is not in 4 bits to fp32: the
            # other side computes in the precision of the row.
            for p in base.parameters():
                p.requires_grad_(False)
        return peft.get_peft_model(base, about)

    def _tensors(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {k: torch.tensor(v, dtype=torch.long, device=self.device) for k, v in batch.items()}

    def step(self) -> float:
        """One training step; its loss."""
        loss = self.forward(**self.batch).loss
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()

    def evaluate(self) -> float:
        """The loss without gradients."""
        self.model.eval()
        with torch.inference_mode():
            loss = self.forward(**self.batch).loss.item()
        self.model.train()
        return loss

    def generate(self) -> int:
        """Greedy tokens after the prompts; how many are new."""
        new = self.job["generation"]["new"]
        options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
        if self.job["compiled"] and self.gpu:
            options["cache_implementation"] = "static"  # which transformers compiles a step for
        self.model.eval()
        with torch.inference_mode():
            out = self.model.generate(**self.prompt, do_sample=False, use_cache=True, **options)
        self.model.train()
        made = out.shape[0] * (out.shape[1] - self.prompt["input_ids"].shape[1])
        self._wait()
        return made

    def memory(self, base: float) -> dict[str, float | None]:
        """`peak_mib` of a step: above `base`, or all of a device's."""
        if not self.gpu:
            return {"peak_mib": host_peak_mib(self.step, base)}
        for _ in range(2):
            self.step()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            self.step()
        return {"peak_mib": torch.cuda.max_memory_allocated() / 2**20}

    def rate(self, m: int, k: int, n: int) -> float:
        """Flops a second of a product of random matrices, `(m, k)` by `(k, n)`."""
        dtype = torch.bfloat16 if self.job["precision"] == "bf16" else torch.float32
        x, y = (torch.randn(s, dtype=dtype, device=self.device) for s in ((m, k), (k, n)))

        def product() -> None:
            torch.matmul(x, y)
            self._wait()

        return rate_of(product, 2.0 * m * k * n)

    def _wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()
