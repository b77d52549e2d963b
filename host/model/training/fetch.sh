#!/bin/sh
# fetch.sh WORK_DIR: the drawings, fonts and photographs that the demo model learns from (licences: ../demo/README.md).
# Needs npm, Debian's apt-get and dpkg (for the fonts), git.
set -eu
work=$1
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$work/npm" "$work/debs" "$work/fonts"
cd "$work/npm"
for package in noto@1.2.9 noto-v1@1.2.5 fluent-emoji-flat@1.2.6 fluent-emoji@1.2.7 twemoji@1.2.5 emojione@1.2.3 openmoji@1.2.29; do
    archive=$(npm pack --silent "@iconify-json/$package")
    mkdir -p "${archive%.tgz}"
    tar xzf "$archive" -C "${archive%.tgz}" --strip-components=1
done
cd ../debs
apt-get download fonts-dejavu-core fonts-liberation2 fonts-roboto-unhinted fonts-lato fonts-open-sans fonts-cantarell fonts-hack \
    fonts-inconsolata fonts-comfortaa fonts-quicksand fonts-crosextra-carlito fonts-dosis fonts-jetbrains-mono
for package in *.deb; do dpkg -x "$package" ../fonts; done
cd ..
if [ ! -d clothing ]; then                         # whole or not at all: what an interruption left is begun anew
    rm -rf photos clothing.partial
    git clone https://github.com/alexeygrigorev/clothing-dataset-small photos
    git -C photos checkout --quiet 1196151
    "${PYTHON:-python3}" "$here/photos.py" photos clothing.partial
    mv clothing.partial clothing
fi
