import sys, torch, deepspeed, torch.distributed as dist, traceback
from pathlib import Path
from datasets import Dataset
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
from tests.zero3_step import *
from tests.models import tokenizer, sentence
folder = Path("/tmp/z3out")
def tried(name, f):
    try:
        print("OK", name, f(), flush=True)
    except Exception as e:
        print("FAIL", name, flush=True); traceback.print_exc()
def ckpt():
    config = {**CONFIG, **OF_THE_TRAINER, "bf16": {"enabled": "auto"}}
    m = tiny(**REPORTED)
    args = arguments(folder, deepspeed=config, bf16=True, gradient_checkpointing=True, max_steps=2, learning_rate=0.01)
    t = HybridDistillationTrainer(m, args, teacher=folder/"teacher", loss=OPTIONS, train_dataset=examples())
    t.train()
    return [e for e in t.state.log_history if "soft_loss" in e]
def z2():
    config = {**CONFIG, **OF_THE_TRAINER, "zero_optimization": {"stage": 2}}
    m = tiny(**REPORTED)
    args = arguments(folder, deepspeed=config, gradient_accumulation_steps=2)
    t = HybridDistillationTrainer(m, args, teacher=folder/"teacher", loss=OPTIONS, train_dataset=examples())
    t.train()
    e, other = tiny(**REPORTED).double(), teacher().double()
    data = batch(rows=8, length=14)
    (dense(e, other, data, 2.0)/(data["labels"][:,1:]!=-100).sum()).backward()
    return max((p - (q - .1*q.grad)).abs().max().item() for p, q in zip(m.parameters(), e.parameters()))
def lora():
    from peft import LoraConfig, get_peft_model
    config = {**CONFIG, **OF_THE_TRAINER}
    m = get_peft_model(tiny(**REPORTED), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    args = arguments(folder, deepspeed=config, max_steps=2, gradient_accumulation_steps=2)
    t = HybridDistillationTrainer(m, args, teacher=folder/"teacher", loss=OPTIONS, train_dataset=examples())
    t.train()
    return [e for e in t.state.log_history if "soft_loss" in e]
def gkd():
    from trl.experimental.gkd import GKDConfig
    from bgkernels.integrations.trl import HybridGKDTrainer
    config = {**CONFIG, **OF_THE_TRAINER}
    rows = [{"messages": [{"role": "user", "content": sentence(3, i)}, {"role": "assistant", "content": sentence(5, 100 + i)}]} for i in range(8)]
    args = GKDConfig(str(folder), deepspeed=config, per_device_train_batch_size=2, max_steps=2, use_cpu=True, report_to=[], logging_steps=1, max_length=32, lmbda=0.0, bf16=False, max_grad_norm=0.0, save_strategy="no", optim="sgd")
    t = HybridGKDTrainer(tiny(**REPORTED), teacher(), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer())
    print(type(t.attachment.teacher.model))
    t.train()
    return [e for e in t.state.log_history if "soft_loss" in e]
def sft():
    from trl import SFTConfig
    from bgkernels.integrations.trl import HybridSFTTrainer
    config = {**CONFIG, **OF_THE_TRAINER}
    rows = [{"text": sentence(8, i)} for i in range(8)]
    args = SFTConfig(str(folder), deepspeed=config, per_device_train_batch_size=2, max_steps=2, use_cpu=True, report_to=[], logging_steps=1, max_length=32, bf16=False, max_grad_norm=0.0, save_strategy="no", optim="sgd")
    t = HybridSFTTrainer(tiny(**REPORTED), args, teacher=folder/"teacher", train_dataset=Dataset.from_list(rows), processing_class=tokenizer(), loss=OPTIONS)
    t.train()
    return [e for e in t.state.log_history if "soft_loss" in e]
def acc():
    # attach after preparation
    m = tiny(**REPORTED)
    e = engine(m, optimizer=torch.optim.SGD(m.parameters(), .1))
    a = attach(e, engine(teacher()), **OPTIONS)
    for i in range(2):
        data = {k: v[dist.get_rank()::2] for k, v in batch(rows=4).items()}
        l = e(**data).loss; e.backward(l); e.step()
    return l.item()
torch.set_num_threads(1)
if dist.get_rank() == 0: teacher().save_pretrained(folder/"teacher")
dist.barrier()
for f in (gkd, sft): tried(f.__name__, f)
