"""A plain loop: another optimizer, and one line more."""

import torch

from ivon_lora import VAdam

torch.manual_seed(0)
inputs = torch.randn(256, 8)
labels = (inputs.sum(1) > 0).long()
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
# before: optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
optimizer = VAdam(model.named_parameters(), lr=1e-2, num_examples=len(inputs))
optimizer.attach(model)  # training forwards sample the weights, others and state_dict() see their mean
for epoch in range(8):
    for batch in torch.randperm(len(inputs)).split(32):
        loss = torch.nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"epoch {epoch} loss {loss:.4f}")
