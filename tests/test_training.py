"""Training on episodes: what a batch is, what a loss teaches, and that a run can be stopped and resumed."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from chatting import byte_tokenizer, chat_model
from datasets import Dataset
from models import ARCHITECTURES, tiny_model
from peft import get_peft_model
from torch.nn.utils.rnn import pad_sequence

from senri_hf import EpisodeCollator, MemoryAdapterConfig, MemoryCache, MemoryTrainer, MemoryTrainingArguments
from senri_hf.memory import episodic, episodic_reader
from senri_hf.memory.episodic_layer import EpisodicLayer
from senri_hf.memory.router_loss import take_router_loss
from senri_hf.training import ask, encode_conversation, tell
from senri_hf.training.told import ToldStates, beginning
from senri_hf.training.trainer import SCALARS, retrieval_loss


def say(text: str, reply: str, **marks: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": reply, **marks}]


EPISODES = [
    {"conversations": [say("i am as", "ok"), say("who", "as", train=True)]},
    {"conversations": [say("i am user", "fine"), say("the sea", "ll", keep=True), say("who", "user", train=True)]},
    {"conversations": [say("hello", "ll", train=True)]},
    {"conversations": [say("my name", "ok"), say("na", "my", train=True), say("who", "name", train=True)]},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def model(tokenizer: Any) -> Any:
    return chat_model(tokenizer)


def trainer(model: Any, tokenizer: Any, folder: Path, **settings: Any) -> MemoryTrainer:
    data = Dataset.from_list([episode | {"length": len(episode["conversations"])} for episode in EPISODES * 2])
    arguments = MemoryTrainingArguments(
        output_dir=str(folder),
        **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2, **settings},
    )
    return MemoryTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=EpisodeCollator(tokenizer)
    )


def batch(tokenizer: Any, side: str = "right") -> list[dict[str, Any]]:
    return EpisodeCollator(tokenizer, padding_side=side)(EPISODES)["conversations"]


def test_only_marked_answers_are_labelled_with_their_end_of_turn(tokenizer: Any) -> None:
    encoded = encode_conversation(tokenizer, say("who are you", "user", train=True))
    labelled = [token for token in encoded["labels"] if token != -100]
    assert tokenizer.decode(labelled) == "user<eos>"
    assert encoded["input_ids"] == tokenizer.apply_chat_template(say("who are you", "user"))["input_ids"]
    assert not any(encoded["keep"])
    kept = encode_conversation(tokenizer, say("who", "user", keep=True))
    assert sum(kept["keep"]) == len(labelled)
    assert set(kept["labels"]) == {-100}


def test_a_user_message_cannot_be_learned(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="'user'"):
        encode_conversation(tokenizer, [{"role": "user", "content": "hi", "train": True}])


def test_without_a_chat_template_the_error_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="chat_template"):
        encode_conversation(byte_tokenizer(None), say("hi", "ok"))


def test_the_last_conversations_stand_side_by_side_and_missing_ones_are_padding(tokenizer: Any) -> None:
    steps = batch(tokenizer)
    assert len(steps) == 3
    assert [bool(step["learns"]) for step in steps] == [False, True, True]
    assert [bool(step["keeps"]) for step in steps] == [False, True, False]
    assert steps[0]["attention_mask"].any(1).tolist() == [False, True, False, True]


def test_padding_on_either_side_teaches_the_same(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    runner = trainer(model.eval(), tokenizer, tmp_path)
    right, _ = runner.run_episodes(model, batch(tokenizer, "right"))
    left, _ = runner.run_episodes(model, batch(tokenizer, "left"))
    torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-5)


def test_every_trainable_parameter_learns_from_two_conversations(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    loss, _ = trainer(model, tokenizer, tmp_path).run_episodes(model.train(), batch(tokenizer))
    loss.backward()
    still = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not [name for name in still if not name.endswith("age_scale")], still


def test_a_loss_reaches_back_as_many_conversations_as_are_not_cut(tokenizer: Any, tmp_path: Path) -> None:
    gradients = {}
    for cut in (1, 4):
        model = chat_model(tokenizer)
        runner = trainer(model, tokenizer, tmp_path, detach_every=cut, predictor_loss_weight=0.0)
        loss, _ = runner.run_episodes(model.train(), batch(tokenizer))
        loss.backward()
        gradients[cut] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert not torch.allclose(gradients[1], gradients[4])


def test_gates_have_their_own_rate_and_no_decay(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    runner = trainer(model, tokenizer, tmp_path, gate_learning_rate_multiplier=7.0, weight_decay=0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in runner.create_optimizer().param_groups:
        scalar = {names[id(p)].endswith(SCALARS) for p in group["params"]}
        assert len(scalar) == 1
        assert group["lr"] == pytest.approx(7e-2 if scalar.pop() else 1e-2)
        if group["lr"] == pytest.approx(7e-2):
            assert group["weight_decay"] == 0


def test_the_learning_rate_ends_where_it_was_told_to(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    runner = trainer(model, tokenizer, tmp_path, min_lr_ratio=0.25, lr_scheduler_type="cosine", warmup_steps=2)
    optimizer = runner.create_optimizer()
    scheduler = runner.create_scheduler(10, optimizer)
    rates = []
    for _ in range(10):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates[-1] == pytest.approx(0.25 * max(rates))


def test_small_talk_that_memory_does_not_change_costs_nothing(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    conversations = EpisodeCollator(tokenizer)([{"conversations": [say("the sea", "ll", keep=True)]}])["conversations"]
    runner = trainer(model.eval(), tokenizer, tmp_path)
    divergence, count = runner.divergence(model, MemoryCache.for_model(model), conversations[0])
    assert count == sum(encode_conversation(tokenizer, say("the sea", "ll", keep=True))["keep"])
    assert divergence.item() == pytest.approx(0, abs=1e-5)
    told = tell(model, tokenizer, [[say("i am as", "ok")]])
    assert runner.divergence(model, told, conversations[0])[0] > 1e-4


def test_reused_states_are_those_that_a_blank_memory_reads(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    episodes = [
        {"conversations": [say("i am as", "ok"), say("who", "as", train=True)]},
        {"conversations": [say("i am a user", "fine"), say("who", "user", train=True)]},
    ]
    conversations = EpisodeCollator(tokenizer)(episodes)["conversations"]
    live = trainer(model.eval(), tokenizer, tmp_path).run_episodes(model, conversations)[0]
    reused = trainer(model, tokenizer, tmp_path, reuse_told_states=True).run_episodes(model, conversations)[0]
    torch.testing.assert_close(live, reused, rtol=2e-2, atol=2e-2)  # kept in bfloat16


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_read_once_gives_the_loss_and_gradients_of_reading_it_every_time(
    arch: str, side: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain way: every text alone and whole, every pass through all layers, tokens written as they come."""
    episodes = [
        {"conversations": [say("i am as", "ok"), say("i am user", "ok", keep=True), say("who", "as", train=True)]},
        {"conversations": [say("i am me", "fine"), say("the sea", "ll", keep=True), say("who", "user", train=True)]},
        {"conversations": [say("i am all", "ok"), say("my name", "ok"), say("na", "my", train=True, answer="m")]},
        {"conversations": [say("i am a sea", "ll", keep=True), say("who", "name", train=True)]},
    ]
    conversations = EpisodeCollator(tokenizer, padding_side=side)(episodes)["conversations"]
    told = [say(f"i am {who}", "ok") for who in ("as", "user")]
    assert beginning([torch.tensor(encode_conversation(tokenizer, text)["input_ids"]) for text in told])

    def whole(told: ToldStates, texts: list[torch.Tensor], places: list[int], stop: int) -> dict[int, torch.Tensor]:
        rows = []
        for text in texts:
            with told.stack.seen(places) as found:
                told.decoder(input_ids=text[None], use_cache=False)
            rows.append(found)
        return {place: pad_sequence([row[place][0] for row in rows], batch_first=True) for place in places}

    def step() -> tuple[Any, ...]:
        model = chat_model(tokenizer, arch)
        runner = trainer(model, tokenizer, tmp_path, reuse_told_states=True)
        assert runner.told is not None
        runner.told.dtype = torch.float32  # type: ignore[misc]
        found = []
        for _ in range(2):  # the second time all that is told is known
            loss, exact = runner.run_episodes(model.train(), conversations)
            loss.backward()
            found += [loss.detach(), exact]
        return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found, gradients = step()
    monkeypatch.setattr(ToldStates, "_pass", whole)
    monkeypatch.setattr(ToldStates, "below", lambda told, conversations: [None] * len(conversations))
    monkeypatch.setattr(ToldStates, "kept_below", lambda told, **inputs: None)
    monkeypatch.setattr(ToldStates, "as_without", lambda told, **inputs: contextlib.nullcontext())
    monkeypatch.setattr(EpisodicLayer, "append_whole", EpisodicLayer.append)
    monkeypatch.setattr(episodic, "occupied", lambda live: live.shape[1])
    monkeypatch.setattr(episodic_reader, "occupied", lambda live: live.shape[1])
    plain, expected = step()
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name


def test_options_that_exclude_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="detach_every=2"):
        MemoryTrainingArguments(output_dir=str(tmp_path), use_cpu=True, detach_every=2, reuse_told_states=True)
    with pytest.raises(ValueError, match="detach_every=0"):
        MemoryTrainingArguments(output_dir=str(tmp_path), use_cpu=True, detach_every=0)
    with pytest.raises(ValueError, match="keep_loss_weight=-1"):
        MemoryTrainingArguments(output_dir=str(tmp_path), use_cpu=True, keep_loss_weight=-1)


def test_states_of_the_models_own_surprise_cannot_be_reused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="predictor"):
        trainer(chat_model(tokenizer, surprise="nll"), tokenizer, tmp_path, reuse_told_states=True)


def test_plain_text_is_read_without_the_template(tokenizer: Any) -> None:
    encoded = encode_conversation(tokenizer, [{"role": "text", "content": "the sea and the sky", "keep": True}], 5)
    assert encoded["input_ids"] == tokenizer("the sea and the sky")["input_ids"][:5]
    assert encoded["keep"] == [1] * 5 and encoded["labels"] == [-100] * 5
    with pytest.raises(ValueError, match="stands alone"):
        encode_conversation(tokenizer, [{"role": "text", "content": "the sea"}, {"role": "user", "content": "hello"}])


def test_a_reply_is_judged_by_the_words_of_its_answer(tokenizer: Any) -> None:
    named = encode_conversation(tokenizer, say("who", "you are Sky and sea", train=True, answer="sky"))
    judged = [token for token, counts in zip(named["input_ids"], named["judged"], strict=True) if counts]
    assert tokenizer.decode(judged).strip() == "Sky"
    whole = encode_conversation(tokenizer, say("who", "you are Sky and sea", train=True))
    assert whole["labels"] == named["labels"]
    assert whole["judged"] == [int(label != -100) for label in whole["labels"]]
    with pytest.raises(ValueError, match="answer='fire'"):
        encode_conversation(tokenizer, say("who", "you are sky", train=True, answer="fire"))


def test_an_evaluation_does_not_mind_other_words_than_the_answer(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    (step,) = EpisodeCollator(tokenizer)([{"conversations": [say("who", "as the sea", train=True)]}])["conversations"]
    runner = trainer(model.eval(), tokenizer, tmp_path)
    with torch.no_grad():
        top = model(input_ids=step["input_ids"], attention_mask=step["attention_mask"]).logits.argmax(-1)
    right = torch.nn.functional.pad(top[:, :-1] == step["labels"][:, 1:], (1, 0))
    assert not right[step["judged"].bool()].all()
    assert runner.run_episodes(model, [step])[1].item() == 0
    wrong = step["judged"].bool() & ~right
    step["judged"], step["labels"][wrong] = wrong.long(), top.roll(1, dims=1)[wrong]
    assert runner.run_episodes(model, [step])[1].item() == 1


def test_the_batch_says_how_long_ago_an_answer_was_told(tokenizer: Any) -> None:
    long = [say("i am as", "ok"), say("the sea", "ll"), say("who", "as", train=True, told_in=0)]
    short = [say("hello", "ok"), say("who", "as", train=True)]
    conversations = EpisodeCollator(tokenizer)([{"conversations": long}, {"conversations": short}])["conversations"]
    assert [step["told_ago"].tolist() for step in conversations] == [[0, 0], [0, 0], [2, 0]]
    with pytest.raises(ValueError, match="told_in=2"):
        EpisodeCollator(tokenizer)([{"conversations": [*long[:2], say("who", "as", train=True, told_in=2)]}])


def test_the_retrieval_loss_rewards_reading_where_the_answer_was_told() -> None:
    """It is the contrastive loss over the conversations that are held, and says nothing of those that are not."""
    absent = -torch.inf
    scores = torch.tensor([[absent, 0.0, 1.0, absent], [absent, 0.0, 0.0, absent], [absent] * 4]).requires_grad_()
    labelled = torch.ones(3, 1, dtype=torch.bool)
    loss = retrieval_loss(scores[:, None, None], labelled, torch.tensor([2, 0, 1]))
    assert torch.isclose(loss, torch.tensor(1.0).exp().add(1).log() - 1)
    loss.backward()
    assert scores.grad is not None and scores.grad.isfinite().all()
    assert scores.grad[0, 2] < 0 < scores.grad[0, 1] and not scores.grad[1:].any()


def test_retrieval_is_learned_where_it_is_said_where_an_answer_was_told(tokenizer: Any, tmp_path: Path) -> None:
    def topic_gradient(weight: float, **told: int) -> torch.Tensor:
        model = chat_model(tokenizer).train()
        run = trainer(model, tokenizer, tmp_path, retrieval_loss_weight=weight)
        facts = [say("i am as", "ok"), say("my name", "ok")]
        batch = EpisodeCollator(tokenizer)([{"conversations": [*facts, say("who", "as", train=True, **told)]}])
        loss, _ = run.run_episodes(model, batch["conversations"])
        loss.backward()
        return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "topic" in n and p.grad is not None])

    without = topic_gradient(0.0, told_in=0)
    assert torch.equal(topic_gradient(1.0), without)
    assert not torch.allclose(topic_gradient(1.0, told_in=0), without)


def test_a_batch_without_a_label_is_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    conversations = EpisodeCollator(tokenizer)([{"conversations": [say("i am as", "ok")]}])["conversations"]
    with pytest.raises(ValueError, match="train"):
        trainer(model, tokenizer, tmp_path).run_episodes(model, conversations)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tokenizer: Any, tmp_path: Path) -> None:
    def run(folder: str, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        model = chat_model(tokenizer)
        settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
        runner = trainer(model, tokenizer, tmp_path / folder, **settings)
        if steps < 4:
            runner.args.max_steps = steps
        runner.train(resume_from_checkpoint=resume or None)
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    whole = run("whole", 4)
    run("parts", 2)
    resumed = run("parts", 4, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    saved = {path.name for path in (tmp_path / "parts" / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved


def test_training_learns_and_evaluation_says_how_well(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    runner = trainer(model, tokenizer, tmp_path, max_steps=12, per_device_train_batch_size=4, save_strategy="no")
    before = runner.evaluate()
    runner.train()
    after = runner.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert 0 <= after["eval_exact"] <= 1


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_torch"])
def test_evaluation_reads_with_the_weights_that_training_left(
    model: Any, tokenizer: Any, tmp_path: Path, optimizer: str
) -> None:
    """Also those that an evaluation before had merged."""
    runner = trainer(model, tokenizer, tmp_path, max_steps=4, optim=optimizer, save_strategy="no")
    memory = tell(model.eval(), tokenizer, [[say("i am as", "ok")]])
    question = {"input_ids": torch.arange(3, 9)[None], "past_key_values": memory}

    def logits() -> Any:
        return model(**question | {"past_key_values": memory.snapshot()}).logits

    with torch.no_grad():
        before = logits()
    runner.train()
    model.eval()
    with_gradient = logits().detach()
    with torch.no_grad():
        without = logits()
    assert not torch.allclose(before, without, atol=1e-3)
    torch.testing.assert_close(without, with_gradient, atol=1e-4, rtol=1e-4)


def test_asking_leaves_the_memory_as_it_is(model: Any, tokenizer: Any) -> None:
    memory = tell(model.eval(), tokenizer, [[say("i am as", "ok")], [say("i am user", "ok"), say("na", "my")]])
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    replies = ask(model, tokenizer, [say("who", "")[:1]] * 2, memory, max_new_tokens=4)
    assert len(replies) == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in memory.state_dict().items())


@pytest.mark.parametrize("coefficient", [0.0, 3.0])
def test_losses_of_routers_are_learned_beside_answers(coefficient: float, tokenizer: Any, tmp_path: Path) -> None:
    """The mean over the conversations that were read with a graph; in evaluation they stay out."""
    bank = MemoryAdapterConfig(
        mechanism="bank", layers_to_transform=[1], num_memory_tokens=16, use_chapters=True, num_chapters=4,
        top_k_chapters=2, load_balance_coefficient=coefficient, use_z_loss=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(tiny_model("llama", vocab_size=len(tokenizer)), bank)
    runner, episodes = trainer(model, tokenizer, tmp_path), batch(tokenizer)
    evaluated, _ = runner.run_episodes(model.eval(), episodes)
    loss, _ = runner.run_episodes(model.train(), episodes)
    spread = loss - evaluated  # load balance is 1 where chapters are read evenly
    assert 0.9 * coefficient <= spread <= 4 * coefficient + 1e-6
    assert take_router_loss(model) is None
