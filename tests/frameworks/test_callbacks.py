"""The callback of transformers and the helpers of accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import minifisher
from tests.frameworks.conftest import needs

needs("transformers")
needs("accelerate")
import accelerate  # noqa: E402
import transformers  # noqa: E402

from minifisher.integrations.accelerate import observe  # noqa: E402
from minifisher.integrations.outputs import prediction, unwrap  # noqa: E402
from minifisher.integrations.transformers import MinifisherCallback  # noqa: E402


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=2,
        max_position_embeddings=8,
    )
    return transformers.BertForSequenceClassification(config)


def trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(20, (6,), generator=generator), "labels": torch.tensor(index % 2)}
        for index in range(32)
    ]
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=8,
        logging_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    return transformers.Trainer(model, arguments, train_dataset=rows, **options)


def test_a_training_that_was_interrupted_leaves_no_hook_to_the_next(tmp_path: Path) -> None:
    model = bert()
    optimizer = minifisher.MBF(model, lr=1e-3, fisher="sampled", statistics_every=1)
    callback = MinifisherCallback()

    class Interrupted(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path, callbacks=[callback, Interrupted()], optimizers=(optimizer, None)).train()
    draws = optimizer.param_groups[0]["label_draws"]
    trainer(model, tmp_path, callbacks=[callback], optimizers=(optimizer, None)).train()
    assert optimizer.param_groups[0]["label_draws"] == draws + 6


def test_the_callback_draws_labels_and_logs(tmp_path: Path) -> None:
    model = bert()
    optimizer = minifisher.MBF(model, fisher="sampled", statistics_every=2)
    run = trainer(model, tmp_path, optimizers=(optimizer, None), callbacks=[MinifisherCallback()])
    hooks = len(model._forward_hooks)
    run.train()
    assert optimizer.param_groups[0]["label_draws"] == 3
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 3
    assert all(-1 <= entry["minifisher/cosine_mean"] <= 1 for entry in logged)
    assert len(model._forward_hooks) == hooks


def test_kbfgs_without_a_closure_says_what_works(tmp_path: Path) -> None:
    model = bert()
    run = trainer(model, tmp_path, optimizers=(minifisher.KBFGS(model), None))
    with pytest.raises(TypeError, match="Trainer of transformers and GradScaler pass none"):
        run.train()


def test_the_callback_refuses_kbfgs_before_the_first_batch(tmp_path: Path) -> None:
    model = bert()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    optimizer = minifisher.KBFGS(model)
    run = trainer(model, tmp_path, optimizers=(optimizer, None), callbacks=[MinifisherCallback()])
    with pytest.raises(TypeError, match=r"KBFGS.*Trainer of transformers and GradScaler pass none"):
        run.train()


@pytest.mark.parametrize("method", ["kbfgs", "kbfgsl"])
def test_accelerate_passes_a_closure_on(method: str) -> None:
    """The wrapper's `step` returns no loss; the weights are those of the optimizer alone, to the last bit."""

    def train(prepares: bool) -> nn.Module:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True)
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        model, optimizer = network, minifisher.METHODS[method](network, lr=1e-2, statistics_every=1)
        if prepares:
            model, optimizer = accelerator.prepare(network, optimizer)
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs), (inputs[:, 0] > 0).long())
            accelerator.backward(loss)
            return loss

        for _ in range(6):
            optimizer.step(closure)
        assert unwrap(optimizer).diagnostics()["weights"]["0.weight"]["pairs"] > 0
        return network

    torch.testing.assert_close(train(True).state_dict(), train(False).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_draws_labels(precision: str) -> None:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    network = nn.Linear(4, 2)
    inner = minifisher.KFAC(network)
    model, optimizer = accelerator.prepare(network, inner)
    outputs = model(torch.randn(8, 4))
    observe(optimizer, outputs)
    accelerator.backward(functional.cross_entropy(outputs, torch.randint(2, (8,))))
    optimizer.step()
    assert unwrap(optimizer) is inner
    assert inner.param_groups[0]["label_draws"] == 1
    assert inner.diagnostics(flat=True)["cosine_mean"] > 0


def test_what_cannot_be_used_is_named() -> None:
    with pytest.raises(TypeError, match="got an optimizer of class AdamW"):
        unwrap(torch.optim.AdamW(nn.Linear(2, 2).parameters()))
    with pytest.raises(TypeError, match="returned a tuple without logits"):
        prediction((torch.ones(1), torch.ones(1)))
