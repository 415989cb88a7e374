"""What relatch is built from, as cargo tells. Run by sbom.sh and test.sh, from the directory of the repository.

    dependencies.py sbom TARGET SECONDS    CycloneDX 1.6 of a binary for TARGET, dated SECONDS after 1970, on standard output
    dependencies.py licences               whether each licence is among those that deny.toml allows
"""

import json
import re
import subprocess
import sys
from datetime import datetime, timezone

# What is released; the same as in deny.toml.
TARGETS = ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"]


def cargo(*arguments):
    command = ["cargo", *arguments, "--locked"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def metadata(targets):
    platforms = [argument for target in targets for argument in ("--filter-platform", target)]
    return json.loads(cargo("metadata", "--format-version", "1", *platforms))


def built(target):
    """The names and versions of what is built for a binary. The metadata have also what features that only tests ask for
    bring along."""
    tree = cargo("tree", "--target", target, "--edges", "normal,build", "--prefix", "none", "--no-dedupe")
    return {tuple(line.split()[:2]) for line in tree.splitlines()}


def checksums():
    """The SHA-256 of each crate's archive, by name and version. Cargo writes the file, always in the same form."""
    with open("Cargo.lock", encoding="utf-8") as file:
        packages = file.read().split("[[package]]\n")[1:]
    field = lambda package, name: re.search(rf'^{name} = "(.*)"$', package, re.MULTILINE)
    return {
        (field(package, "name")[1], field(package, "version")[1]): field(package, "checksum")[1]
        for package in packages
        if field(package, "checksum")
    }


def reachable(target):
    """The packages that a binary needs, each as `normal` when its code is in it, or as `build` when it only ran as that was
    made: build scripts, macros, and what those need. What only tests need is not among them."""
    told, names = metadata([target]), built(target)
    packages = {package["id"]: package for package in told["packages"]}
    nodes = {node["id"]: node for node in told["resolve"]["nodes"]}
    root = told["resolve"]["root"]
    kinds = {}
    waiting = [(root, "normal")]
    while waiting:
        package, kind = waiting.pop()
        if (packages[package]["name"], f"v{packages[package]['version']}") not in names:
            continue
        if any("proc-macro" in target["kind"] for target in packages[package]["targets"]):
            kind = "build"
        if kinds.get(package) in (kind, "normal"):
            continue
        kinds[package] = kind
        for dependency in nodes[package]["deps"]:
            needs = {needed["kind"] for needed in dependency["dep_kinds"]}
            if None in needs:
                waiting.append((dependency["pkg"], kind))
            if "build" in needs:
                waiting.append((dependency["pkg"], "build"))
    return root, kinds, packages, nodes


def purl(package):
    return f"pkg:cargo/{package['name']}@{package['version'].replace('+', '%2B')}"


def component(package, kind, hashes):
    told = {
        "type": "application" if kind == "root" else "library",
        "bom-ref": purl(package),
        "name": package["name"],
        "version": package["version"],
        "purl": purl(package),
    }
    if package.get("description"):
        told["description"] = " ".join(package["description"].split())
    if package.get("license"):
        told["licenses"] = [{"expression": expression(package)}]
    checksum = hashes.get((package["name"], package["version"]))
    if checksum:
        told["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    if package.get("repository"):
        told["externalReferences"] = [{"type": "vcs", "url": package["repository"]}]
    if kind != "root":
        # Excluded is what is not there when the binary runs.
        told["scope"] = "required" if kind == "normal" else "excluded"
        told["properties"] = [{"name": "cargo:dependency", "value": kind}]
    return told


def sbom(target, seconds):
    root, kinds, packages, nodes = reachable(target)
    hashes = checksums()
    order = sorted(kinds, key=lambda package: purl(packages[package]))
    refs = lambda package: sorted(
        purl(packages[dependency["pkg"]])
        for dependency in nodes[package]["deps"]
        if dependency["pkg"] in kinds and any(needed["kind"] != "dev" for needed in dependency["dep_kinds"])
    )
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": component(packages[root], "root", hashes),
            "properties": [{"name": "cargo:target", "value": target}],
        },
        "components": [
            component(packages[package], kinds[package], hashes)
            for package in order
            if package != root
        ],
        "dependencies": [
            {"ref": purl(packages[package]), "dependsOn": refs(package)} for package in order
        ],
    }


def expression(package):
    # Before SPDX a slash stood for a choice.
    return package["license"].replace("/", " OR ")


def allowed():
    """The licences of deny.toml."""
    with open("deny.toml", encoding="utf-8") as file:
        text = re.sub(r"^\s*#.*$", "", file.read(), flags=re.MULTILINE)
    section = text.split("[licenses]")[1]
    return set(re.findall(r'"([^"]+)"', re.search(r"^allow = \[(.*?)\]", section, re.DOTALL | re.MULTILINE)[1]))


def is_allowed(text, allow):
    """Whether what an SPDX expression asks for can be had: AND binds more tightly than OR."""
    tokens = re.findall(r"\(|\)|[^\s()]+", text)

    def either():
        found = both()
        while tokens and tokens[0] == "OR":
            tokens.pop(0)
            found = both() or found
        return found

    def both():
        found = one()
        while tokens and tokens[0] == "AND":
            tokens.pop(0)
            found = one() and found
        return found

    def one():
        name = tokens.pop(0)
        if name == "(":
            found = either()
            tokens.pop(0)
            return found
        if tokens[:1] == ["WITH"]:
            name = " ".join([name, tokens.pop(0), tokens.pop(0)])
        return name in allow

    return either()


def licences():
    allow = allowed()
    refused = [
        f"{package['name']} {package['version']}: {package.get('license') or 'no licence'}"
        for package in metadata(TARGETS)["packages"]
        if not package.get("license") or not is_allowed(expression(package), allow)
    ]
    if refused:
        sys.exit("\n".join(["not among the licences that deny.toml allows:", *sorted(refused)]))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["sbom", target, seconds]:
            json.dump(sbom(target, int(seconds)), sys.stdout, indent=2, ensure_ascii=False)
            print()
        case ["licences"]:
            licences()
        case _:
            sys.exit(__doc__)
