"""Losses on relations among the rows of a batch: distances, angles, similarities, contrast.

They compare what each model makes of PAIRS of rows, so the embeddings of student and teacher may
have different widths. Embeddings are rows of a table; feature maps are pooled or flattened by
whoever calls. The teacher's side is a constant, the result float32 or wider, an empty batch costs
0. The pure functions work under ``torch.func.vmap`` and ``torch.func.grad``.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedkd.targets import at_least_float32, check_temperature

ZERO_LENGTH = 1e-12
"""Vectors no longer than this have no direction; they count as zero vectors."""

PKT_FLOOR = 1e-7
"""Least probability of which `pkt_loss` takes a logarithm. The published code ADDS this number,
which changes the value by less than it but leaves a gradient where student and teacher agree."""


def rkd_distance_loss(
    student_embedding: Float[Tensor, "batch student_width"],
    teacher_embedding: Float[Tensor, "batch teacher_width"],
) -> Float[Tensor, ""]:
    """Relational distillation: rows as far from each other as in the teacher's space.

    Euclidean distances between all rows, each model's divided by its own mean over the pairs of
    different rows, are compared by the Huber loss with threshold 1 and averaged over batch^2.
    Neither a rotation nor a change of scale of one embedding makes a difference.

    Args:
        student_embedding: one vector per row; gradients flow through these.
        teacher_embedding: vectors for the same rows; treated as constants.

    Returns:
        Loss without a unit, >= 0. It is 0 with a zero gradient for a single row, which has no
        distance; coincident rows give a finite loss and move nothing apart.

    Source:
        Park, Kim, Lu, Cho, 2019, equations 4 to 6. https://arxiv.org/abs/1904.05068
    """
    student = _relative_distances(student_embedding)
    teacher = _relative_distances(teacher_embedding.detach()).to(student.dtype)
    return _mean(F.smooth_l1_loss(student, teacher, reduction="none"))


def rkd_angle_loss(
    student_embedding: Float[Tensor, "batch student_width"],
    teacher_embedding: Float[Tensor, "batch teacher_width"],
) -> Float[Tensor, ""]:
    """Relational distillation: three rows form the angles that they form in the teacher's space.

    Cosines of the angle at row i between the directions to rows j and k, for all triplets, are
    compared by the Huber loss with threshold 1 and averaged over batch^3. Triplets in which two
    rows are the same are equal on both sides and count in the average, as published.

    Args:
        student_embedding: one vector per row; gradients flow through these.
        teacher_embedding: vectors for the same rows; treated as constants.

    Returns:
        Loss without a unit, >= 0; takes memory for batch^2 * width + batch^3 numbers. It is 0 with
        a zero gradient for one row or two, which form no angle. A direction between coincident
        rows counts as the zero vector.

    Source:
        Park, Kim, Lu, Cho, 2019, equations 7 to 9. https://arxiv.org/abs/1904.05068
    """
    student = _angle_cosines(student_embedding)
    teacher = _angle_cosines(teacher_embedding.detach()).to(student.dtype)
    return _mean(F.smooth_l1_loss(student, teacher, reduction="none"))


def similarity_preserving_loss(
    student_embedding: Float[Tensor, "batch student_width"],
    teacher_embedding: Float[Tensor, "batch teacher_width"],
) -> Float[Tensor, ""]:
    """Rows with similar activations in the teacher get similar ones in the student.

    ``||G_s - G_t||_F^2 / batch^2`` of the matrices of inner products between rows, every matrix
    row scaled to unit length.

    Args:
        student_embedding: one vector per row, in the paper a flattened feature map; gradients
            flow through these.
        teacher_embedding: vectors for the same rows; treated as constants.

    Returns:
        Loss without a unit, in [0, 4 / batch]; 0 with a zero gradient for a single row. The
        paper's weight for it is 3000.

    Source:
        Tung and Mori, 2019, equations 3 and 4. https://arxiv.org/abs/1907.09682
    """
    student = _unit(_inner_products(at_least_float32(student_embedding)))
    teacher = _unit(_inner_products(at_least_float32(teacher_embedding.detach())))
    return _mean((student - teacher.to(student.dtype)).square())


def pkt_loss(
    student_embedding: Float[Tensor, "batch student_width"],
    teacher_embedding: Float[Tensor, "batch teacher_width"],
) -> Float[Tensor, ""]:
    """Probabilistic knowledge transfer: each row finds the others as likely as in the teacher.

    ``(cosine + 1) / 2`` between rows, every matrix row scaled to sum 1, is a distribution over
    rows; the loss is KL(teacher || student) averaged over batch^2 ENTRIES, not rows, as in the
    published code. That is why its usual weight is as large as 30000.

    Args:
        student_embedding: one vector per row; gradients flow through these.
        teacher_embedding: vectors for the same rows; treated as constants.

    Returns:
        Loss in nats per pair of rows, >= 0 up to `PKT_FLOOR`; 0 with a zero gradient for a single
        row. A zero vector is at cosine 0 to every row.

    Source:
        Passalis and Tefas, 2018, equations 3 to 6. https://arxiv.org/abs/1803.10837
    """
    student = _neighbour_probabilities(student_embedding)
    teacher = _neighbour_probabilities(teacher_embedding.detach()).to(student.dtype)
    log_ratio = teacher.clamp_min(PKT_FLOOR).log() - student.clamp_min(PKT_FLOOR).log()
    return _mean(teacher * log_ratio)


def noise_contrastive_loss(
    positive_scores: Float[Tensor, "batch"],
    negative_scores: Float[Tensor, "batch negatives"],
    *,
    num_rows: int,
    log_normaliser: Float[Tensor, ""] | float,
) -> Float[Tensor, ""]:
    """Tell the row that belongs to an anchor from rows drawn at random.

    With p = exp(score) / Z and noise q = negatives / num_rows, computes
    ``-log(p / (p + q))`` of the positive plus the sum of ``-log(q / (p + q))`` over the negatives,
    averaged over the batch. Logarithms are taken before any exponential overflows.

    Args:
        positive_scores: log of the unnormalised density of each anchor's own row.
        negative_scores: the same for the rows drawn for it; with none, p has nothing to be told
            from and the loss is 0.
        num_rows: rows in the bank the negatives were drawn from, >= 1.
        log_normaliser: log Z, a constant.

    Returns:
        Loss in nats per anchor, >= 0.

    Source:
        Gutmann and Hyvärinen, 2010, as used by Tian, Krishnan, Isola, 2020, section 3.
        https://arxiv.org/abs/1910.10699
    """
    num_negatives = negative_scores.shape[1]
    positive = at_least_float32(positive_scores)
    negative = at_least_float32(negative_scores).to(positive.dtype)
    if num_negatives == 0:
        return (positive * 0).sum()
    if isinstance(log_normaliser, Tensor):
        log_normaliser = log_normaliser.detach().to(positive.dtype)
    offset = log_normaliser + math.log(num_negatives / num_rows)
    row_losses = F.softplus(offset - positive) + F.softplus(negative - offset).sum(dim=1)
    return row_losses.sum() / max(len(row_losses), 1)


def contrastive_representation_loss(
    student_embedding: Float[Tensor, "batch dim"],
    teacher_embedding: Float[Tensor, "batch dim"],
    student_memory: Float[Tensor, "rows dim"],
    teacher_memory: Float[Tensor, "rows dim"],
    *,
    row_ids: Int[Tensor, "batch"],
    negative_ids: Int[Tensor, "batch negatives"],
    student_log_normaliser: Float[Tensor, ""] | float,
    teacher_log_normaliser: Float[Tensor, ""] | float,
    temperature: float = 0.07,
) -> Float[Tensor, ""]:
    """Contrastive representation distillation, both directions, against two banks of old rows.

    The student's embedding has to find its row in the teacher's bank, and the teacher's embedding
    its row in the student's bank, by `noise_contrastive_loss` of inner products over
    ``temperature``.

    Args:
        student_embedding: vectors of unit length; gradients flow through these.
        teacher_embedding: vectors of unit length; gradients flow through these too, because the
            projection that makes them is trained. Detach what goes INTO that projection.
        student_memory: the student's vectors of all rows, of unit length; a constant.
        teacher_memory: the teacher's vectors of all rows, of unit length; a constant.
        row_ids: bank row of each row of the batch, in [0, rows).
        negative_ids: bank rows drawn for each row of the batch.
        student_log_normaliser: log Z of the student's embedding against the teacher's bank.
        teacher_log_normaliser: log Z of the teacher's embedding against the student's bank.
        temperature: divisor of the inner products, > 0.

    Returns:
        Loss in nats per row, >= 0, both directions added.

    Raises:
        ValueError: if ``temperature`` is not positive and finite.

    Source:
        Tian, Krishnan, Isola, 2020, section 3. https://arxiv.org/abs/1910.10699
    """
    total = torch.zeros((), device=student_embedding.device)
    for embedding, memory, log_normaliser in (
        (student_embedding, teacher_memory, student_log_normaliser),
        (teacher_embedding, student_memory, teacher_log_normaliser),
    ):
        scores = _scores(embedding, memory, temperature)
        total = total + noise_contrastive_loss(
            scores.gather(1, row_ids[:, None]).squeeze(1),
            scores.gather(1, negative_ids),
            num_rows=len(memory),
            log_normaliser=log_normaliser,
        )
    return total


class ContrastiveMemory(nn.Module):
    """Projections and banks of embeddings for `contrastive_representation_loss`.

    Keeps one unit vector per row of the training data and model, keyed by row id, so the order in
    which a loader hands out rows cannot mix them up. After each loss in training mode the rows of
    the batch move to ``momentum * old + (1 - momentum) * new``, scaled to unit length again.

    The projections are trained with the student; neither they nor the banks belong to it. Weights
    and banks are drawn from torch's global generator, as those of every layer: build it inside
    ``fedkd.randomness.seeded_torch``.

    Args:
        student_width: width of the student's features.
        teacher_width: width of the teacher's features.
        num_rows: rows in the training data, >= 2.
        dim: width of the embeddings that are compared.
        num_negatives: rows drawn to contrast each row with, >= 1; no more than there are other
            rows (of other classes, with ``row_labels``).
        temperature: divisor of the inner products, > 0.
        momentum: share of a row's old embedding that is kept, in [0, 1).
        row_labels: class of every row, where known: negatives then come from other classes only.

    Raises:
        ValueError: if an argument is out of range, or all rows are of one class.

    Source:
        Tian, Krishnan, Isola, 2020, and their published code (128 dimensions, 16384 negatives,
        temperature 0.07, momentum 0.5). https://arxiv.org/abs/1910.10699
    """

    student_memory: Tensor
    teacher_memory: Tensor
    student_log_normaliser: Tensor
    teacher_log_normaliser: Tensor
    row_labels: Tensor | None

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        num_rows: int,
        *,
        dim: int = 128,
        num_negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        row_labels: Int[Tensor, "rows"] | None = None,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        if num_rows < 2:
            raise ValueError(f"num_rows must be >= 2, one row has no negatives; got {num_rows}")
        if num_negatives < 1:
            raise ValueError(f"num_negatives must be >= 1, got {num_negatives}")
        if dim < 1:
            raise ValueError(f"dim must be >= 1, got {dim}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if row_labels is not None and len(row_labels) != num_rows:
            raise ValueError(f"row_labels must be {num_rows} classes, got {len(row_labels)}")
        most_alike = 1
        if row_labels is not None:
            most_alike = int(row_labels.unique(return_counts=True)[1].max())
        if most_alike == num_rows:
            raise ValueError("row_labels must name at least 2 classes, got 1: no negatives")
        self.num_rows = num_rows
        self.num_negatives = min(num_negatives, num_rows - most_alike)
        self.temperature = temperature
        self.momentum = momentum
        self.student_projection = nn.Linear(student_width, dim)
        self.teacher_projection = nn.Linear(teacher_width, dim)
        self.register_buffer("student_memory", _unit(torch.rand(num_rows, dim) * 2 - 1))
        self.register_buffer("teacher_memory", _unit(torch.rand(num_rows, dim) * 2 - 1))
        # Not a number: not estimated yet. The first batch decides, as published.
        self.register_buffer("student_log_normaliser", torch.tensor(math.nan))
        self.register_buffer("teacher_log_normaliser", torch.tensor(math.nan))
        self.register_buffer("row_labels", row_labels, persistent=False)

    def draw_negatives(
        self, row_ids: Int[Tensor, "batch"], generator: torch.Generator
    ) -> Int[Tensor, "batch negatives"]:
        """Draw different rows to contrast each row with, never the row itself.

        Args:
            row_ids: bank row of each row of the batch, in [0, num_rows).
            generator: where the draws come from, on the device of ``row_ids``.
        """
        if self.row_labels is None:
            eligible = torch.ones(len(row_ids), self.num_rows, device=row_ids.device)
            eligible.scatter_(1, row_ids[:, None], 0.0)
        else:
            eligible = (self.row_labels[row_ids][:, None] != self.row_labels).float()
        return torch.multinomial(eligible, self.num_negatives, generator=generator)

    def forward(
        self,
        student_features: Float[Tensor, "batch student_width"],
        teacher_features: Float[Tensor, "batch teacher_width"],
        row_ids: Int[Tensor, "batch"],
        *,
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        """Return the loss of a batch; in training mode, remember the batch afterwards.

        Args:
            student_features: gradients flow through these.
            teacher_features: treated as constants; the teacher's projection gets a gradient.
            row_ids: the batch's rows, in [0, num_rows), each at most once.
            generator: where the negatives come from.

        Raises:
            ValueError: if a row id is out of range.
        """
        if len(row_ids) == 0:
            return at_least_float32(student_features).sum() * 0
        low, high = int(row_ids.min()), int(row_ids.max())
        if low < 0 or high >= self.num_rows:
            raise ValueError(
                f"row ids must be in [0, {self.num_rows}), got ids from {low} to {high}"
            )
        row_ids = row_ids.long()
        negative_ids = self.draw_negatives(row_ids, generator)
        with torch.autocast(student_features.device.type, enabled=False):
            student = _unit(_project(self.student_projection, student_features))
            teacher = _unit(_project(self.teacher_projection, teacher_features.detach()))
        # Banks are overwritten below, so the graph keeps what they were.
        student_memory, teacher_memory = self.student_memory.clone(), self.teacher_memory.clone()
        drawn = torch.cat([row_ids[:, None], negative_ids], dim=1)
        student_log_normaliser = _settled(
            self.student_log_normaliser, student, teacher_memory, drawn, self.temperature
        )
        teacher_log_normaliser = _settled(
            self.teacher_log_normaliser, teacher, student_memory, drawn, self.temperature
        )
        loss = contrastive_representation_loss(
            student,
            teacher,
            student_memory,
            teacher_memory,
            row_ids=row_ids,
            negative_ids=negative_ids,
            student_log_normaliser=student_log_normaliser,
            teacher_log_normaliser=teacher_log_normaliser,
            temperature=self.temperature,
        )
        if self.training:
            self.student_log_normaliser.copy_(student_log_normaliser)
            self.teacher_log_normaliser.copy_(teacher_log_normaliser)
            for memory, embedding in (
                (self.student_memory, student),
                (self.teacher_memory, teacher),
            ):
                moved = self.momentum * memory[row_ids] + (1 - self.momentum) * embedding.detach()
                memory[row_ids] = _unit(moved)
        return loss


def _project(
    projection: nn.Linear, features: Float[Tensor, "batch width"]
) -> Float[Tensor, "batch dim"]:
    projected: Tensor = projection(features.to(projection.weight.dtype))
    return projected


@torch.no_grad()
def _settled(
    log_normaliser: Float[Tensor, ""],
    embedding: Float[Tensor, "batch dim"],
    memory: Float[Tensor, "rows dim"],
    drawn: Int[Tensor, "batch candidates"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Keep a normaliser once there is one, else estimate it from the rows that were drawn."""
    scores = _scores(embedding, memory, temperature).gather(1, drawn)
    estimate = scores.flatten().logsumexp(0) - math.log(scores.numel()) + math.log(len(memory))
    return torch.where(log_normaliser.isnan(), estimate.to(log_normaliser.dtype), log_normaliser)


def _scores(
    embedding: Float[Tensor, "batch dim"], memory: Float[Tensor, "rows dim"], temperature: float
) -> Float[Tensor, "batch rows"]:
    """Score all rows of a bank: one matrix product, where gathering rows first copies vectors."""
    check_temperature(temperature)
    wide = at_least_float32(embedding)
    with torch.autocast(embedding.device.type, enabled=False):
        return wide @ memory.detach().to(wide.dtype).t() / temperature


def _relative_distances(
    embedding: Float[Tensor, "batch width"],
) -> Float[Tensor, "batch batch"]:
    wide = at_least_float32(embedding)
    # Differences, not |x|^2 + |y|^2 - 2xy: exact for rows that lie close, and of gradient 0 where
    # they coincide.
    distances = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / max(len(wide) * (len(wide) - 1), 1)
    return distances / torch.where(mean > ZERO_LENGTH, mean, torch.ones_like(mean))


def _angle_cosines(
    embedding: Float[Tensor, "batch width"],
) -> Float[Tensor, "batch batch batch"]:
    wide = at_least_float32(embedding)
    directions = _unit(wide[None, :, :] - wide[:, None, :])
    with torch.autocast(embedding.device.type, enabled=False):
        return directions @ directions.transpose(1, 2)


def _neighbour_probabilities(
    embedding: Float[Tensor, "batch width"],
) -> Float[Tensor, "batch batch"]:
    similarities = (_inner_products(_unit(at_least_float32(embedding))) + 1) / 2
    return similarities / similarities.sum(dim=1, keepdim=True)


def _inner_products(
    embedding: Float[Tensor, "batch width"],
) -> Float[Tensor, "batch batch"]:
    with torch.autocast(embedding.device.type, enabled=False):
        return embedding @ embedding.t()


def _unit(vectors: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """Scale vectors to length 1; those without a direction become 0 and get no gradient."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    # Dividing by infinity, not by a small number, whose gradient would be huge.
    return vectors / torch.where(length > ZERO_LENGTH, length, math.inf)


def _mean(values: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    return values.sum() / max(values.numel(), 1)
