// What is wrong with how a page looks: too wide, too faint, too small to hit, without a name.
() => {
    const root = document.documentElement;
    const numbers = text => (text.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(each => each / 255)
        .map(each => each <= 0.03928 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
        .reduce((sum, each, at) => sum + each * [0.2126, 0.7152, 0.0722][at], 0);
    const ground = element => {
        for (let at = element; at; at = at.parentElement) {
            const found = numbers(getComputedStyle(at).backgroundColor);
            if (found.length < 4 || found[3] > 0) return found;
        }
        return numbers(getComputedStyle(root).backgroundColor);
    };
    // WCAG, contrast of text: 4.5 to 1 at least.
    const faint = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest('.hidden, .skip')) continue;
        const [one, other] = [light(numbers(getComputedStyle(element).color)), light(ground(element))];
        const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
        if (contrast < 4.5) faint.push([walker.currentNode.data.trim(), contrast]);
    }
    // WCAG 2.2, target size: 24 by 24 at least.
    const small = [...document.querySelectorAll('button, .button, input:not([type=hidden]), nav a')]
        .filter(each => each.checkVisibility() && each.getBoundingClientRect().height < 24).map(each => each.outerHTML);
    const unnamed = [...document.querySelectorAll('input:not([type=hidden]), select')].filter(each => !each.labels.length).map(each => each.name);
    return {wide: root.scrollWidth - root.clientWidth, faint, small, unnamed, headings: document.querySelectorAll('h1').length};
}
