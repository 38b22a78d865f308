"""Factorise numbers as futures: results in the order in which they are done, with logs and costs.

Each Mersenne number 2ᵖ − 1 is factorised by Pollard's rho method (J. M. Pollard, "A Monte Carlo
method for factorization", BIT 15, 1975) in a call of its own. Some take hundreds of times longer
than others, so ``as_completed`` of the standard library hands them out as they are done. ``submit``
and the futures are those of ``concurrent.futures``; what a future knows besides is what its call
took and cost, and what it has printed. A last call gets the futures of all others as its argument:
it starts when they are done, and their results do not pass through this program.

Run it with ``python futures.py``.
"""

import math
import sys
from concurrent.futures import as_completed

from dask_lambda import LambdaExecutor, last_report

EXPONENTS = (29, 37, 41, 43, 47, 53, 59, 67)


def is_prime(n: int) -> bool:
    """The Miller–Rabin test, exact below 3.3e24 with these bases (Sorenson and Webster, 2015)."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if n < 2 or any(n % base == 0 for base in bases):
        return n in bases
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in bases:
        powers = [pow(base, odd << i, n) for i in range(twos)]
        if powers[0] != 1 and n - 1 not in powers:
            return False
    return True


def divisor(n: int) -> int:
    """A proper divisor of a number that is no prime: Pollard's rho method."""
    for shift in range(1, n):
        slow = fast = 2
        steps, found = 0, 1
        while found == 1:
            slow = (slow * slow + shift) % n
            fast = (fast * fast + shift) % n
            fast = (fast * fast + shift) % n
            found = math.gcd(fast - slow, n)
            steps += 1
        if found != n:
            print(f"{n} is divisible by {found}, found after {steps:,} steps")
            return found
    raise ValueError(n)


def factors(n: int) -> list[int]:
    """The prime factors of n in ascending order."""
    if is_prime(n):
        return [n]
    found = divisor(n)
    return sorted(factors(found) + factors(n // found))


def largest(lists: list[list[int]]) -> int:
    """The largest of all numbers in some lists."""
    return max(map(max, lists))


def main() -> None:
    """Factorise the numbers, and multiply the factors again."""
    results = {}
    with LambdaExecutor() as executor:
        futures = {executor.submit(factors, 2**p - 1): p for p in EXPONENTS}
        record = executor.submit(largest, list(futures))  # it waits for them, this program does not
        for future in as_completed(futures):
            p = futures[future]
            results[p] = future.result()
            print(f"2^{p} - 1 = {' * '.join(map(str, results[p]))}")
            report = future.report
            print(f"    {report.seconds:.3f} s in Lambda, ${report.cost_usd:.7f}; it printed:")
            for line in future.logs().splitlines():
                if "is divisible by" in line:
                    print(f"    | {line}")
        print(f"the largest factor: {record.result()}")

    for p, found in results.items():
        if math.prod(found) != 2**p - 1 or not all(map(is_prime, found)):
            sys.exit(f"check failed: {found} are not the prime factors of 2^{p} - 1")
    if sorted(results) != sorted(EXPONENTS) or record.result() != largest(list(results.values())):
        sys.exit("check failed: a number is missing, or the largest factor is not the largest")
    print("check passed: all factors are primes, and their products are the numbers")
    print(last_report())


if __name__ == "__main__":
    main()
