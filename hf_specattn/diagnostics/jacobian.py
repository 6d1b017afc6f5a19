"""The Jacobian of one attention head with respect to (W_Q, W_K, W_V): its singular values, without building it.

In the paper's orientation, with `G_i = V^T Lambda(P_i)`, `M_i = scale * G_i K` and `B_i = scale * G_i X`, the `d_v` rows of
J that belong to query i are

    [ M_i (x) x_i    B_i (x) q_i    I (x) (P X)_i ]

so that the `(i, j)` block of `J J^T` is `(x_i . x_j) M_i M_j^T + (q_i . q_j) B_i B_j^T + ((PX)_i . (PX)_j) I`. `J^T J` is
made of the same parts. Both are built by matrix products.

Directions of X that carry nothing are taken out first, which changes no nonzero singular value: X enters the query's part,
its differences from the mean the key's (a constant added to every key changes no softmax), and `P X` the value's, each in
coordinates of its own row space. What then remains of zeros in `J^T J` is the gauge: `W_Q A, -W_K A^T`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .heads import AttentionHead

EPSILON = torch.finfo(torch.float64).eps

# Above this size the extreme eigenvalues come from a Cholesky factor, below it all of them from LAPACK.
FULL_SPECTRUM_SIZE = 384
# Elements of J up to which its own SVD may be taken where squaring does not suffice: 256 MiB.
SVD_ELEMENTS = 2**25
# Rows of J that are processed together, in elements.
CHUNK_ELEMENTS = 2**24
LANCZOS_TOLERANCE = 1e-11


class NotConvergedError(RuntimeError):
    """An iteration for extreme eigenvalues did not converge."""


@dataclass(frozen=True, eq=False)
class JacobianSpectrum:
    """Singular values of the Jacobian of one head.

    Attributes:
        sigma_max: the largest.
        sigma_min: the smallest nonzero one; if `is_lower_bound`, its largest possible value.
        shape: of J: `(N d_v, 2 d D + d_v D)`.
        rank: the number of nonzero singular values; None if `is_lower_bound`.
        source: `"gram"` (eigenvalues of `J J^T` or `J^T J`) or `"svd"` (of J itself).
        tolerance: singular values up to `tolerance * sigma_max` count as zero, or cannot be distinguished from it.
        is_lower_bound: whether the smallest singular value is too small for the Gram matrix, and J too large for its SVD, so
            that `kappa` is only a lower bound.
        singular_values: all nonzero ones, descending, on request; else None.
    """

    sigma_max: float
    sigma_min: float
    shape: tuple[int, int]
    rank: int | None
    source: str
    tolerance: float
    is_lower_bound: bool
    singular_values: Tensor | None

    @property
    def kappa(self) -> float:
        """`sigma_max / sigma_min`; a lower bound if `is_lower_bound`."""
        return self.sigma_max / self.sigma_min if self.sigma_min > 0 else math.inf

    @property
    def relative_error(self) -> float:
        """The order of the relative error of kappa: `eps * kappa^2` from a Gram matrix, `eps * kappa` from the SVD."""
        return EPSILON * (self.kappa**2 if self.source == "gram" else self.kappa)

    def __str__(self) -> str:
        return f"{'at least ' if self.is_lower_bound else ''}{self.kappa:.4g}"


@torch.no_grad()
def jacobian_spectrum(
    head: AttentionHead, *, full: bool = False, svd_elements: int = SVD_ELEMENTS
) -> JacobianSpectrum:
    """The extreme singular values of the head's Jacobian with respect to (W_Q, W_K, W_V), in float64.

    Of `J J^T` or `J^T J`, whichever is smaller. Squaring resolves singular values down to `sqrt(size * eps)` of the
    largest, some 1e-6; if the smallest is below that, the SVD of J itself is computed if J is small enough; otherwise
    kappa is "at least" what can be resolved.

    Args:
        full: whether to return all singular values; takes `(4/3) size^3` operations instead of a third of that number.
        svd_elements: how many elements J may have, in the coordinates described above, for its SVD to be taken.
    """
    parts = JacobianParts.of(head)
    wide = parts.rows <= parts.columns - parts.most_zeros
    gauge = None if wide else parts.gauge()
    gram = parts.outer_gram() if gauge is None else parts.inner_gram()
    nonzero = len(gram) - (0 if gauge is None else gauge.shape[1])
    tolerance = math.sqrt(len(gram) * EPSILON)
    sigma = extreme_eigenvalues(gram, full, gauge).clamp_min(0).sqrt().flip(0).cpu()
    del gram
    resolved = bool(sigma[-1] > tolerance * sigma[0])
    if not resolved and parts.rows * parts.columns <= svd_elements:
        return _by_svd(head, parts, full)
    return JacobianSpectrum(
        sigma_max=sigma[0].item(),
        sigma_min=sigma[-1].item() if resolved else tolerance * sigma[0].item(),
        shape=head_shape(head),
        rank=nonzero if resolved else None,
        source="gram",
        tolerance=tolerance,
        is_lower_bound=not resolved,
        singular_values=sigma if full and resolved else None,
    )


def head_shape(head: AttentionHead) -> tuple[int, int]:
    """The shape of the head's Jacobian, `(N d_v, 2 d D + d_v D)`."""
    return head.x.shape[0] * head.value.shape[0], head.query.numel() + head.key.numel() + head.value.numel()


def jacobian_matrix(head: AttentionHead) -> Tensor:
    """J itself in the coordinates described above, `(N d_v, columns)`: the same nonzero singular values, fewer columns."""
    return torch.cat([rows.flatten(0, 1) for rows in JacobianParts.of(head).jacobian_rows()])


def _by_svd(head: AttentionHead, parts: "JacobianParts", full: bool) -> JacobianSpectrum:
    matrix = torch.cat([rows.flatten(0, 1) for rows in parts.jacobian_rows()])
    # The triangular factor has J's singular values and is square.
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    sigma = torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R).cpu()
    tolerance = max(matrix.shape) * EPSILON
    nonzero = sigma[sigma > tolerance * sigma[0]] if sigma[0] > 0 else sigma[:0]
    smallest = nonzero[-1].item() if len(nonzero) else 0.0
    return JacobianSpectrum(
        sigma_max=sigma[0].item(),
        sigma_min=smallest,
        shape=head_shape(head),
        rank=len(nonzero),
        source="svd",
        tolerance=tolerance,
        is_lower_bound=False,
        singular_values=nonzero if full else None,
    )


# --- the parts of J --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ReducedInputs:
    """A head's inputs and weights in coordinates in which the inputs carry something in every direction.

    Attributes:
        x, query: `(N, r_q)`, the inputs at the queries, and W_Q, `(r_q, d)`.
        key_x, key: `(M, r_k)`, the inputs at the keys, as differences from their mean where there is no rotation, and W_K,
            `(r_k, d)`.
        mixed: `(N, r_y)`, P X.
        gauge_weights: W_Q, W_K and b_Q as they enter the gauge: where X can produce a constant, as it can behind a layer norm
            with a bias, b_Q is part of W_Q. b_Q is None where it is part of it, zero or absent.
    """

    x: Tensor
    query: Tensor
    key_x: Tensor
    key: Tensor
    mixed: Tensor
    gauge_weights: tuple[Tensor, Tensor, Tensor | None]

    @classmethod
    def of(cls, head: AttentionHead) -> "ReducedInputs":
        """The head's own."""
        x, query = _in_row_space(head.x, head.query, head.epsilon)
        key_x, key = _in_row_space(head.keys_x, head.key, head.epsilon)
        mixed, _ = _in_row_space(head.weights() @ key_x, key.mT, EPSILON)
        if head.rotation is None:
            key_x, key = _in_row_space(key_x - key_x.mean(dim=0), key.mT, head.epsilon)
        bias, gauge_query = head.query_bias, query
        if bias is not None:
            ones = x.new_ones(len(x), 1)
            constant = torch.linalg.lstsq(x, ones).solution
            produces = (x @ constant - ones).norm() <= max(head.x.shape) * head.epsilon * ones.norm()
            if produces:
                gauge_query = query + constant * bias
            bias = None if produces or not bias.any() else bias
        return cls(x, query, key_x, key, mixed, (gauge_query, key, bias))


def _in_row_space(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`x` `(N, D)` and a weight `(d, D)` in an orthonormal basis of x's row space: `(N, r)` and the paper's `(r, d)`."""
    left, sigma, right = torch.linalg.svd(x, full_matrices=False)
    # Roundoff of the forward pass that made a tall x gives it full rank. What there is of a wide one counts.
    relative = epsilon if x.shape[0] > x.shape[1] else EPSILON
    rank = int((sigma > max(x.shape) * relative * sigma[0]).sum())
    return left[:, :rank] * sigma[:rank], right[:rank] @ weight.mT


@dataclass(frozen=True, eq=False)
class JacobianParts:
    """What `J`, `J J^T` and `J^T J` are made of, all in reduced coordinates (the module's docstring).

    N queries, M keys, head widths d and d_v; `r_q`, `r_k` and `r_y` are the ranks of X, of its differences and of `P X`.

    Attributes:
        inputs: X, P X and the weights.
        products: `(N, d_v, d)`, M_i.
        queries: `(N, d)`, q_i.
        key_inputs: `(N, d_v, r_k)`, B_i; with a rotation None.
        rotated: with a rotation, what stands in for `B_i (x) q_i`: scale * G_i `(N, d_v, M)`, the inputs at the keys
            `(M, r_k)`, and `R_l^T q_i` `(N, M, d)`.
    """

    inputs: ReducedInputs
    products: Tensor
    queries: Tensor
    key_inputs: Tensor | None
    rotated: tuple[Tensor, Tensor, Tensor] | None

    @classmethod
    def of(cls, head: AttentionHead) -> "JacobianParts":
        """From the head's inputs and weights."""
        weights, queries = head.weights(), head.queries()
        values = head.keys_x @ head.value.mT
        # G_i[:, l] = P_il (v_l - sum_m P_im v_m): Lambda(P_i) without its cancellation.
        differences = values.mT[None] - (weights @ values)[:, :, None]
        scaled = head.scale * weights[:, None, :] * differences
        inputs = ReducedInputs.of(head)
        if head.rotation is None:
            key_inputs = scaled @ inputs.key_x
            return cls(inputs, key_inputs @ inputs.key, queries, key_inputs, None)
        rotated = (scaled, inputs.key_x, torch.einsum("lfe,if->ile", head.keys_rotation, queries))
        return cls(inputs, scaled @ head.keys() @ head.rotation, queries, None, rotated)

    @property
    def rows(self) -> int:
        """`N d_v`."""
        return self.products.shape[0] * self.products.shape[1]

    @property
    def columns(self) -> int:
        """`r_q d + r_k d + r_y d_v`."""
        return (
            self.inputs.query.numel() + self.inputs.key.numel() + self.inputs.mixed.shape[1] * self.products.shape[1]
        )

    def outer_gram(self) -> Tensor:
        """`J J^T`, `(N d_v, N d_v)`."""
        gram = self.inputs.x.new_empty(self.rows, self.rows)
        width, products = self.products.shape[1], self.products.flatten(0, 1)
        of_inputs, of_queries = self.inputs.x @ self.inputs.x.mT, self.queries @ self.queries.mT
        of_mixed = self.inputs.mixed @ self.inputs.mixed.mT
        identity = torch.eye(width, dtype=gram.dtype, device=gram.device)
        for start, stop in _chunks(self.inputs.x.shape[0], width * self.rows):
            here = slice(start * width, stop * width)
            block = gram[here].view(stop - start, width, -1, width)
            torch.mm(products[here], products.mT, out=gram[here])
            block *= of_inputs[start:stop, None, :, None]
            if self.key_inputs is not None:
                factors = self.key_inputs.flatten(0, 1)
                term = (factors[here] @ factors.mT).view_as(block)
                block += term.mul_(of_queries[start:stop, None, :, None])
            block += of_mixed[start:stop, None, :, None] * identity[:, None, :]
        for factors in self._rotated_columns():
            gram.addmm_(factors, factors.mT)
        return gram

    def inner_gram(self) -> Tensor:
        """`J^T J`, in the order (query, key, value), each (input, head dimension)."""
        if self.key_inputs is None:
            rows = (part.flatten(0, 1) for part in self.jacobian_rows())
            total = self.inputs.x.new_zeros(self.columns, self.columns)
            for part in rows:
                total.addmm_(part.mT, part)
            return total
        x, mixed, products, queries = self.inputs.x, self.inputs.mixed, self.products, self.queries
        inputs = self.key_inputs
        # Each is a sum over the queries i of a product of two tensors of which one has only indices of the inputs: a
        # matrix product over i.
        query_query = _sum_over_queries(_pairs(x, x), products.mT @ products, "cdef->cedf")
        key_key = _sum_over_queries(inputs.mT @ inputs, _pairs(queries, queries), "cdef->cedf")
        query_key = _sum_over_queries(_pairs(x, queries), products.mT @ inputs, "cfed->cedf")
        query_value = _sum_over_queries(_pairs(x, mixed), products.mT, "cfea->cefa")
        key_value = _sum_over_queries(_pairs(queries, mixed), inputs.mT, "efca->cefa")
        value_value = torch.kron(mixed.mT @ mixed, torch.eye(products.shape[1], dtype=x.dtype, device=x.device))
        return torch.cat(
            [
                torch.cat([query_query, query_key, query_value], dim=1),
                torch.cat([query_key.mT, key_key, key_value], dim=1),
                torch.cat([query_value.mT, key_value.mT, value_value], dim=1),
            ]
        )

    def jacobian_rows(self) -> Iterator[Tensor]:
        """The rows of J in chunks of queries, `(chunk, d_v, columns)`."""
        identity = torch.eye(self.products.shape[1], dtype=self.inputs.x.dtype, device=self.inputs.x.device)
        for start, stop in _chunks(self.inputs.x.shape[0], self.products.shape[1] * self.columns):
            here = slice(start, stop)
            of_query = torch.einsum("iae,ic->iace", self.products[here], self.inputs.x[here])
            if self.key_inputs is not None:
                of_key = torch.einsum("iac,ie->iace", self.key_inputs[here], self.queries[here])
            else:
                assert self.rotated is not None
                scaled, key_x, turned = self.rotated
                of_key = torch.einsum("ial,lc,ile->iace", scaled[here], key_x, turned[here])
            of_value = torch.einsum("if,ab->iafb", self.inputs.mixed[here], identity)
            yield torch.cat([part.flatten(2) for part in (of_query, of_key, of_value)], dim=2)

    @property
    def most_zeros(self) -> int:
        """The largest dimension that the gauge can have."""
        return 0 if self.rotated is not None else self.queries.shape[1] ** 2

    def gauge(self) -> Tensor:
        """An orthonormal basis of the directions `(W_Q A, -W_K A^T, 0)` along which nothing changes, `(columns, count)`.

        With a query bias (which stays) only those with `b_Q A = 0`; with a rotation they are not counted.
        """
        if self.rotated is not None:
            return self.inputs.x.new_zeros(self.columns, 0)
        query, key, bias = self.inputs.gauge_weights
        left, right, squares = gauge_eigenbases(query, key, bias)
        of_query = torch.einsum("ci,ej->ceij", query @ left, right)
        of_key = -torch.einsum("cj,ei->ceij", key @ right, left)
        directions = torch.cat([of_query.flatten(0, 1), of_key.flatten(0, 1)]).flatten(1)
        carrying = (squares > 0).flatten()
        basis = directions[:, carrying] / squares.flatten()[carrying].sqrt()
        return torch.cat([basis, basis.new_zeros(self.columns - len(basis), basis.shape[1])])

    def _rotated_columns(self) -> Iterator[Tensor]:
        """With a rotation, the key's columns of J, one head dimension at a time, `(N d_v, r_k)`."""
        if self.rotated is not None:
            scaled, key_x, turned = self.rotated
            for dimension in range(turned.shape[2]):
                yield ((scaled * turned[:, None, :, dimension]) @ key_x).flatten(0, 1)


def gauge_eigenbases(query: Tensor, key: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """U, V and s for which `A = u_i v_j^T` are orthogonal directions `(W_Q A, -W_K A^T)` of squared length `s_ij`.

    `|W_Q A|^2 + |W_K A^T|^2` is a Kronecker sum, diagonal in the eigenvectors of `W_Q^T W_Q` and of `W_K^T W_K`. With a
    query bias, which stays what it is, only the A with `b_Q A = 0` change nothing.

    Args:
        query, key: `(., d)`, in the paper's orientation.
        bias: `(d,)`, nonzero, or None.

    Returns:
        `(d, u)` with u = d, or d - 1 beside a bias; `(d, d)`; `(u, d)`, 0 where it is so within roundoff.
    """
    width = query.shape[1]
    free = torch.eye(width, dtype=query.dtype, device=query.device)
    if bias is not None:
        free = torch.linalg.qr(bias[:, None], mode="complete").Q[:, 1:]
    alpha, left = torch.linalg.eigh(free.mT @ query.mT @ query @ free)
    beta, right = torch.linalg.eigh(key.mT @ key)
    squares = alpha[:, None] + beta
    return free @ left, right, torch.where(squares > width * EPSILON * squares.max(), squares, 0.0)


def _pairs(left: Tensor, right: Tensor) -> Tensor:
    return left[:, :, None] * right[:, None, :]


def _sum_over_queries(left: Tensor, right: Tensor, order: str) -> Tensor:
    """Sum over i of `left[i] (x) right[i]`, `(p, q)` and `(r, s)` matrices, its four indices put in order as a matrix."""
    total = left.flatten(1).mT @ right.flatten(1)
    total = torch.einsum(order, total.view(*left.shape[1:], *right.shape[1:]))
    return total.flatten(2).flatten(0, 1)


def _chunks(count: int, elements_each: int) -> Iterator[tuple[int, int]]:
    size = max(1, CHUNK_ELEMENTS // elements_each)
    for start in range(0, count, size):
        yield start, min(start + size, count)


# --- extreme eigenvalues ---------------------------------------------------------------------------------------------


def extreme_eigenvalues(gram: Tensor, full: bool, zeros: Tensor | None = None) -> Tensor:
    """The eigenvalues of a symmetric positive semidefinite matrix beside zero: the smallest and largest, or all if `full`.

    Args:
        gram: `(n, n)`; overwritten where `zeros` are given.
        full: whether all are wanted.
        zeros: an orthonormal basis of its known null space, `(n, z)`; None: empty.

    Returns:
        `(2,)` or `(n - z,)`, ascending. Those below `n * eps` of the largest are not to be relied on; where the matrix is not
        numerically positive definite beside its null space, the smallest may be given as 0.
    """
    count = 0 if zeros is None else zeros.shape[1]
    if full or len(gram) <= FULL_SPECTRUM_SIZE:
        values = torch.linalg.eigvalsh(gram)[count:]
        return values if full else values[[0, -1]]
    largest = largest_eigenvalue(gram)
    if zeros is not None:
        gram.addmm_(zeros, zeros.mT, alpha=largest)  # the null space moves to the other end
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        return gram.new_tensor([0.0, largest])
    try:
        inverse = _lanczos(lambda vector: torch.cholesky_solve(vector[:, None], factor)[:, 0], factor)
    except NotConvergedError:
        # Next to singular, a solve carries more rounding than the iteration tolerates; LAPACK takes the matrix itself.
        del factor
        return gram.new_tensor([max(torch.linalg.eigvalsh(gram)[0].item(), 0.0), largest])
    return factor.new_tensor([1 / inverse, largest])


def largest_eigenvalue(gram: Tensor) -> float:
    """Of a symmetric `(n, n)` matrix, by the Lanczos iteration."""
    return _lanczos(lambda vector: gram @ vector, gram)


def _lanczos(product: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """The largest eigenvalue of the symmetric matrix in `product`, by ARPACK through SciPy."""
    try:
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
    except ImportError as error:
        raise ImportError("The Jacobian's singular values need SciPy: pip install 'hf_specattn[train]'.") from error

    def on_device(vector: np.ndarray) -> np.ndarray:
        return product(torch.from_numpy(vector.ravel()).to(like)).cpu().numpy()

    size = len(like)
    operator = LinearOperator((size, size), matvec=on_device, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    try:
        values = eigsh(operator, k=1, which="LA", v0=start, tol=LANCZOS_TOLERANCE, return_eigenvectors=False)
    except ArpackNoConvergence as error:
        raise NotConvergedError(
            f"The Lanczos iteration on a matrix of size {size} did not converge; ask for full=True, which uses LAPACK."
        ) from error
    return float(values[0])
